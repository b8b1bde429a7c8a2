"""Plain English captions of clips: many wordings for one subject, some of them kept out of training for good.

A caption is a *frame* around a subject and a verb phrase: "a video of {subject} {doing}". Frames and verb
phrases are numbered; a pair whose numbers add up to a multiple of `_HELD_OUT_EVERY` is held out. Training draws
other pairs only, so no held-out wording can ever be seen in it, while each of its parts is. The plain frame
with the first verb phrase ("a red circle moving right") belongs to training.
"""

from dataclasses import dataclass

import numpy as np

from common.models.demo.clips import Action, Scale, Shape, Subject

_HELD_OUT_EVERY = 5

DOING_FRAMES = (
    "{subject} {verb}",
    "a video of {subject} {verb}",
    "{subject} is {verb}",
    "an animation of {subject} {verb}",
    "{subject} {verb} on a dark background",
    "a short clip of {subject} {verb}",
    "there is {subject} {verb}",
    "{subject}, {verb}",
    "show me {subject} {verb}",
    "{subject} that is {verb}",
    "a simple scene with {subject} {verb}",
)
DOES_FRAMES = (
    "{subject} {verb}",
    "a video in which {subject} {verb}",
    "{subject} that {verb}",
    "{subject} {verb} on a dark background",
    "in this clip {subject} {verb}",
    "an animation where {subject} {verb}",
    "{subject} which {verb}",
)

VERBS: dict[Action, tuple[tuple[str, str], ...]] = {
    Action.RIGHT: (
        ("moving right", "moves right"),
        ("moving to the right", "moves to the right"),
        ("sliding to the right", "slides to the right"),
        ("moving from left to right", "moves from left to right"),
        ("drifting right", "drifts right"),
        ("gliding to the right", "glides to the right"),
        ("going right", "goes right"),
        ("travelling rightward", "travels rightward"),
    ),
    Action.LEFT: (
        ("moving left", "moves left"),
        ("moving to the left", "moves to the left"),
        ("sliding to the left", "slides to the left"),
        ("moving from right to left", "moves from right to left"),
        ("drifting left", "drifts left"),
        ("gliding to the left", "glides to the left"),
        ("going left", "goes left"),
        ("travelling leftward", "travels leftward"),
    ),
    Action.UP: (
        ("moving up", "moves up"),
        ("rising", "rises"),
        ("moving upward", "moves upward"),
        ("floating up", "floats up"),
        ("sliding up", "slides up"),
        ("going up", "goes up"),
        ("climbing", "climbs"),
        ("moving from the bottom to the top", "moves from the bottom to the top"),
    ),
    Action.DOWN: (
        ("moving down", "moves down"),
        ("falling", "falls"),
        ("moving downward", "moves downward"),
        ("sinking", "sinks"),
        ("sliding down", "slides down"),
        ("going down", "goes down"),
        ("dropping", "drops"),
        ("moving from the top to the bottom", "moves from the top to the bottom"),
    ),
    Action.GROW: (
        ("growing", "grows"),
        ("getting bigger", "gets bigger"),
        ("growing larger", "grows larger"),
        ("expanding", "expands"),
        ("getting larger", "gets larger"),
        ("swelling", "swells"),
    ),
    Action.SHRINK: (
        ("shrinking", "shrinks"),
        ("getting smaller", "gets smaller"),
        ("growing smaller", "grows smaller"),
        ("contracting", "contracts"),
        ("becoming smaller", "becomes smaller"),
        ("dwindling", "dwindles"),
    ),
    Action.BOUNCE: (
        ("bouncing", "bounces"),
        ("bouncing up and down", "bounces up and down"),
        ("jumping", "jumps"),
        ("hopping up and down", "hops up and down"),
        ("jumping up and down", "jumps up and down"),
        ("hopping", "hops"),
    ),
    Action.SPIN: (
        ("spinning", "spins"),
        ("rotating", "rotates"),
        ("turning around", "turns around"),
        ("spinning around", "spins around"),
        ("turning in place", "turns in place"),
        ("twirling", "twirls"),
    ),
}
SHAPE_NAMES: dict[Shape, tuple[str, ...]] = {
    Shape.CIRCLE: ("circle", "circle", "circle", "disc", "ball"),
    Shape.SQUARE: ("square", "square", "square", "box"),
    Shape.TRIANGLE: ("triangle",),
    Shape.STAR: ("star",),
}
COLOUR_NAMES: dict[str, tuple[str, ...]] = {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
SCALE_WORDS: dict[Scale, tuple[str, ...]] = {
    Scale.SMALL: ("small", "little", "tiny"),
    Scale.BIG: ("big", "large", "huge"),
}
_FILLERS = ("nice", "bright", "beautiful", "shiny", "plain", "lovely", "clean", "single")
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Wording:
    """A frame and a verb phrase, by number; `finite` picks "moves" and its frames instead of "moving"."""

    finite: bool
    frame: int
    verb: int

    @property
    def held_out(self) -> bool:
        return (self.frame + self.verb + 1) % _HELD_OUT_EVERY == 0


def wordings(action: Action, held_out: bool) -> list[Wording]:
    """Every wording of an action that training uses, or every one that it never does."""
    every = [
        Wording(finite, frame, verb)
        for finite, frames in ((False, DOING_FRAMES), (True, DOES_FRAMES))
        for frame in range(len(frames))
        for verb in range(len(VERBS[action]))
    ]
    return [wording for wording in every if wording.held_out == held_out]


def caption(subject: Subject, wording: Wording, rng: np.random.Generator, made_up_words: float = 0.0) -> str:
    """One caption of a subject in this wording; names and articles are drawn from `rng`.

    made_up_words: how often a word without meaning stands among the others.
    """
    verb = VERBS[subject.action][wording.verb][wording.finite]
    frame = (DOES_FRAMES if wording.finite else DOING_FRAMES)[wording.frame]
    return frame.format(subject=_noun_phrase(subject, rng, made_up_words), verb=verb)


def training_caption(subject: Subject, rng: np.random.Generator) -> str:
    """A caption as training sees it: the plainest wording often, else any that is not held out."""
    if rng.random() < 0.25:
        wording = Wording(finite=False, frame=0, verb=int(rng.integers(2)))
    else:
        choices = wordings(subject.action, held_out=False)
        wording = choices[int(rng.integers(len(choices)))]
    text = caption(subject, wording, rng, made_up_words=0.1)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def held_out_caption(subject: Subject, rng: np.random.Generator) -> str:
    """A caption in a wording that training never uses."""
    choices = wordings(subject.action, held_out=True)
    return caption(subject, choices[int(rng.integers(len(choices)))], rng)


def plain_caption(subject: Subject) -> str:
    """The canonical sentence: "a red circle moving right"."""
    words = [word for word in (_first(SCALE_WORDS.get(subject.scale)), subject.colour, str(subject.shape)) if word]
    verb = VERBS[subject.action][0][0]
    return " ".join((article(words[0]), *words, verb))


def _noun_phrase(subject: Subject, rng: np.random.Generator, made_up_words: float) -> str:
    words: list[str] = []
    if subject.scale is not Scale.NORMAL:
        words.append(_choose(rng, SCALE_WORDS[subject.scale]))
    if rng.random() < made_up_words:
        # A word that tells nothing, known or made up, so that the model learns to read past what it cannot know.
        made_up = "".join(rng.choice(_LETTERS, size=int(rng.integers(3, 9))))
        words.append(_choose(rng, _FILLERS) if rng.random() < 0.5 else made_up)
    words.append(_choose(rng, COLOUR_NAMES.get(subject.colour, (subject.colour,))))
    words.append(_choose(rng, SHAPE_NAMES[subject.shape]))
    first = article(words[0]) if rng.random() < 0.75 else "the"
    return " ".join((first, *words))


def article(following: str) -> str:
    """The article for a noun phrase that begins with this word."""
    return "an" if following[0] in "aeiou" else "a"


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _first(options: tuple[str, ...] | None) -> str:
    return options[0] if options else ""
