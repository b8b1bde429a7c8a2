"""Ideas for videos as people might type them, each with the caption that the demo video model understands.

An idea says some of a colour, a shape and a motion, in any order and spelling, among words that tell nothing. What it
leaves open is given by a rule (`words.USUAL_COLOUR`, `words.USUAL_ACTION`), so that one idea has one caption. Every
fifth combination of words and every fifth template is kept out of training (`draw_idea(..., held_out=True)`).
"""

import zlib
from dataclasses import dataclass

import numpy as np

from common.models.demo.captions import DOING_FRAMES, SCALE_WORDS, SHAPE_NAMES, VERBS, Wording, article
from common.models.demo.clips import Action, Scale, Shape, Subject
from common.models.demo_language.motions import Motion, draw_motion
from common.models.demo_language.spoiling import choose, made_up_word, spoil
from common.models.demo_language.templates import AFTER, BEFORE, COUNTS, FILLERS, SHARES, TEMPLATES
from common.models.demo_language.words import (
    COLOURS,
    EMOJI,
    KEPT_NOUNS,
    SCALES,
    SHADES,
    SHAPES,
    THINGS,
    UNKNOWN_THINGS,
    USUAL_ACTION,
    USUAL_COLOUR,
    Thing,
)

_HELD_OUT_EVERY = 5
_PLAINLY = 0.3
"""How often a colour or a shape is called by its own name, synonyms apart."""


@dataclass(frozen=True)
class Stated:
    """What an idea says for sure; None is open."""

    colour: str | None = None
    shape: Shape | None = None
    action: Action | None = None

    def agrees(self, subject: Subject | None) -> bool:
        """Whether a caption's subject has all of it."""
        return subject is not None and (
            self.colour in (None, subject.colour)
            and self.shape in (None, subject.shape)
            and self.action in (None, subject.action)
        )


@dataclass(frozen=True)
class Idea:
    """What somebody types, what it states, and its caption; `mistyped` where a slip changed the text."""

    text: str
    stated: Stated
    caption: str
    mistyped: bool


@dataclass(frozen=True)
class _Noun:
    """A word for a shape, a thing or a sign, with what it implies; the shape of an unknown thing is open."""

    text: str
    shape: Shape | None
    colour: str | None = None
    usual_action: Action | None = None


@dataclass(frozen=True)
class _Facts:
    """The words an idea is made of; None where it does not say."""

    colour: str | None
    colour_word: str | None
    noun: _Noun | None
    motion: Motion | None

    @property
    def held_out(self) -> bool:
        words = (self.colour_word, self.noun and self.noun.text, self.motion and self.motion.text)
        said = [word for word in words if word]
        return len(said) > 1 and zlib.crc32("|".join(said).encode()) % _HELD_OUT_EVERY == 0


def draw_idea(rng: np.random.Generator, held_out: bool = False) -> Idea:
    """An idea as training sees it, or one in an unused template, whose words, if more than one, never meet in it."""
    said = choose(rng, tuple(SHARES), tuple(SHARES.values()))
    facts = _draw_facts(said, rng)
    while facts.held_out != (held_out and len(said) > 1):
        facts = _draw_facts(said, rng)
    scale = _draw_scale(facts, rng)
    templates = TEMPLATES[said]
    numbers = [n for n in range(len(templates)) if (n % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == held_out]
    text = _fill(templates[numbers[int(rng.integers(len(numbers)))]], facts, scale, rng)
    before, frame = choose(rng, BEFORE) if rng.random() < 0.35 else ("", 0)
    after = choose(rng, AFTER) if rng.random() < 0.3 else ""
    meant = " ".join(part for part in (before, text, after) if part)
    text = spoil(meant, rng)
    subject = _subject(facts, scale)
    noun_colour = facts.noun.colour if facts.noun and facts.noun.text in EMOJI else None
    stated = Stated(
        colour=facts.colour or noun_colour,
        shape=subject.shape if facts.noun and facts.noun.shape else None,
        action=facts.motion.action if facts.motion else None,
    )
    return Idea(text, stated, _caption(subject, facts, frame), mistyped=text != meant)


def _draw_facts(said: str, rng: np.random.Generator) -> _Facts:
    colour = choose(rng, tuple(COLOURS)) if "c" in said else None
    return _Facts(
        colour=colour,
        colour_word=_name_or_synonym(colour, COLOURS[colour], rng) if colour else None,
        noun=_draw_noun(rng) if "s" in said else None,
        motion=draw_motion(choose(rng, tuple(Action)), rng) if "m" in said else None,
    )


def _draw_noun(rng: np.random.Generator) -> _Noun:
    chance = rng.random()
    if chance < 0.18:
        thing: Thing = choose(rng, THINGS)
        return _Noun(thing.name, thing.shape, thing.colour, thing.action)
    if chance < 0.24:
        sign = choose(rng, tuple(EMOJI))
        colour, shape = EMOJI[sign]
        return _Noun(sign, shape, colour)
    if chance < 0.29:
        return _Noun(choose(rng, UNKNOWN_THINGS) if rng.random() < 0.6 else made_up_word(rng), None)
    shape = choose(rng, tuple(Shape))
    return _Noun(_name_or_synonym(shape, SHAPES[shape], rng), shape)


def _name_or_synonym(name: str, synonyms: tuple[str, ...], rng: np.random.Generator) -> str:
    return str(name) if rng.random() < _PLAINLY else choose(rng, synonyms)


def _draw_scale(facts: _Facts, rng: np.random.Generator) -> Scale:
    if facts.noun is None or rng.random() > 0.14:
        return Scale.NORMAL
    return choose(rng, (Scale.SMALL, Scale.BIG))


def _subject(facts: _Facts, scale: Scale) -> Subject:
    """The facts, completed. A circle that spins becomes a star, because a circle's turning would not show."""
    spins = facts.motion is not None and facts.motion.action is Action.SPIN
    shape = (facts.noun and facts.noun.shape) or Shape.CIRCLE
    if spins and shape is Shape.CIRCLE:
        shape = Shape.STAR
    usual = facts.noun.usual_action if facts.noun and facts.noun.usual_action else USUAL_ACTION[shape]
    action = facts.motion.action if facts.motion else usual
    noun_colour = facts.noun.colour if facts.noun else None
    # What grows or shrinks has no size of its own in the video model's captions.
    resized = action in (Action.GROW, Action.SHRINK)
    return Subject(
        colour=facts.colour or noun_colour or USUAL_COLOUR[shape],
        shape=shape,
        action=action,
        scale=Scale.NORMAL if resized else scale,
    )


def _caption(subject: Subject, facts: _Facts, frame: int) -> str:
    """The subject in the grammar's words, as near to the idea's as they go; never a wording kept out of training."""
    verb = facts.motion.verb if facts.motion else 0
    if Wording(finite=False, frame=frame, verb=verb).held_out:
        verb = 0
    kept = KEPT_NOUNS.get(facts.noun.text) if facts.noun else None
    noun = kept if kept in SHAPE_NAMES[subject.shape] else str(subject.shape)
    words = [subject.colour, noun]
    if subject.scale is not Scale.NORMAL:
        words.insert(0, SCALE_WORDS[subject.scale][0])
    phrase = " ".join((article(words[0]), *words))
    return DOING_FRAMES[frame].format(subject=phrase, verb=VERBS[subject.action][verb][0])


def _fill(template: str, facts: _Facts, scale: Scale, rng: np.random.Generator) -> str:
    """The template with the facts' words in it, among some that tell nothing."""
    colour = _colour_text(facts, rng) if facts.colour_word else ""
    noun = _noun_text(facts.noun, scale, rng) if facts.noun else ""
    if rng.random() < 0.06:
        telling_nothing = choose(rng, FILLERS) if rng.random() < 0.6 else made_up_word(rng)
        if noun and (not colour or rng.random() < 0.5):
            noun = f"{telling_nothing} {noun}"
        elif colour:
            colour = f"{telling_nothing} {colour}"
    return template.format(c=colour, s=noun, m=facts.motion.text if facts.motion else "")


def _colour_text(facts: _Facts, rng: np.random.Generator) -> str:
    word = facts.colour_word or ""
    if rng.random() < 0.06:
        return f"{choose(rng, SHADES)} {word}"
    if rng.random() < 0.03:
        others = [colour for colour in COLOURS if colour != facts.colour]
        other = choose(rng, COLOURS[choose(rng, tuple(others))])
        return choose(rng, ("{} not {}", "{}, not {},", "{} instead of {}", "{} (never {})", "{} and no {}")).format(
            word, other
        )
    return word


def _noun_text(noun: _Noun, scale: Scale, rng: np.random.Generator) -> str:
    text = noun.text
    if rng.random() < 0.03 and text.isascii():
        text = f"{choose(rng, COUNTS)} {text}{'es' if text.endswith('x') else 's'}"
    if rng.random() < 0.02:
        other = choose(rng, SHAPES[choose(rng, tuple(Shape))])
        text += f" and a {choose(rng, COLOURS[choose(rng, tuple(COLOURS))])} {other}"
    return text if scale is Scale.NORMAL else f"{choose(rng, SCALES[scale])} {text}"
