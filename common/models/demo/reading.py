"""Reads a caption of the demo video model back into its subject: the grammar of `captions.py`, the other way round."""

import functools
import re
from collections.abc import Iterable

from common.models.demo.captions import COLOUR_NAMES, DOES_FRAMES, DOING_FRAMES, SCALE_WORDS, SHAPE_NAMES, VERBS
from common.models.demo.clips import COLOURS, Action, Scale, Shape, Subject


def read_caption(text: str) -> Subject | None:
    """What a caption asks for, or None if it is not wholly in the grammar (case and a last full stop are free)."""
    text = text.strip().lower().removesuffix(".")
    for pattern, actions in _patterns():
        if found := pattern.fullmatch(text):
            scale = found["scale"]
            return Subject(
                colour=_colours()[found["colour"]],
                shape=_shapes()[found["shape"]],
                action=actions[found["verb"]],
                scale=_scales()[scale] if scale else Scale.NORMAL,
            )
    return None


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], dict[str, Action]], ...]:
    """For each frame its pattern, and the action of each verb phrase that may stand in it."""
    noun_phrase = (
        f"(?:an?|the) (?:(?P<scale>{_any(_scales())}) )?(?P<colour>{_any(_colours())}) (?P<shape>{_any(_shapes())})"
    )
    patterns = []
    for finite, frames in ((False, DOING_FRAMES), (True, DOES_FRAMES)):
        actions = {verbs[finite]: action for action, phrases in VERBS.items() for verbs in phrases}
        for frame in frames:
            pattern = frame.format(subject=noun_phrase, verb=f"(?P<verb>{_any(actions)})")
            patterns.append((re.compile(pattern), actions))
    return tuple(patterns)


def _any(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words)


@functools.cache
def _colours() -> dict[str, str]:
    return {name: colour for colour in COLOURS for name in (colour, *COLOUR_NAMES.get(colour, ()))}


@functools.cache
def _shapes() -> dict[str, Shape]:
    return {name: shape for shape, names in SHAPE_NAMES.items() for name in names}


@functools.cache
def _scales() -> dict[str, Scale]:
    return {word: scale for scale, words in SCALE_WORDS.items() for word in words}
