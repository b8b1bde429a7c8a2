"""What people say for the demo video model's eight actions: verbs in their forms, directions, signs, other languages.

Every phrase leads to one of the grammar's own verb phrases, by its number in `captions.VERBS`: "slides right" to
"sliding to the right", most others to the plainest one.
"""

from dataclasses import dataclass

import numpy as np

from common.models.demo.clips import MOVES, Action


@dataclass(frozen=True)
class Motion:
    """A phrase, the action it asks for, and the number of the caption's verb phrase."""

    text: str
    action: Action
    verb: int


_SIDEWAYS = {"slide": 2, "drift": 4, "float": 4, "glide": 5, "go": 6}
_VERB_NUMBERS: dict[Action, dict[str, int]] = {
    Action.RIGHT: _SIDEWAYS,
    Action.LEFT: _SIDEWAYS,
    Action.UP: {"float": 3, "slide": 4, "go": 5},
    Action.DOWN: {"slide": 4, "go": 5},
}
_GOING = (
    *("move", "move", "move", "go", "go", "go", "slide", "drift", "float", "glide", "travel", "fly", "run", "head"),
    *("roll", "walk", "shift", "zoom", "dash", "race", "scroll", "march", "creep", "swim", "zip", "wander", "shoot"),
)
_DIRECTIONS: dict[Action, tuple[str, ...]] = {
    Action.RIGHT: (
        *("right", "right", "to the right", "to the right", "rightwards", "rightward", "towards the right", "to right"),
        *("from left to right", "to the right side", "in the right direction", "east", "eastwards", "->", "→"),
    ),
    Action.LEFT: (
        *("left", "left", "to the left", "to the left", "leftwards", "leftward", "towards the left", "to left"),
        *("from right to left", "to the left side", "in the left direction", "west", "westwards", "<-", "←"),
    ),
    Action.UP: (
        *("up", "up", "up", "upwards", "upward", "to the top", "towards the top", "from the bottom to the top"),
        *("from bottom to top", "north", "skywards", "higher", "up and away", "up into the sky", "↑", "^"),
    ),
    Action.DOWN: (
        *("down", "down", "down", "downwards", "downward", "to the bottom", "towards the bottom", "to the ground"),
        *("from the top to the bottom", "from top to bottom", "south", "lower", "to the floor", "↓"),
    ),
}
_BARE: dict[Action, tuple[str, ...]] = {
    Action.RIGHT: (
        *("right", "right", "to the right", "rightwards", "left to right", "from left to right", "l-r", "l->r"),
        *("l to r", "->", "-->", "--->", "=>", "→", "➡️", "➡", ">>", ">>>", "right side", "goes to the right edge"),
        *("nach rechts", "geht nach rechts", "rechts", "à droite", "vers la droite", "va à droite", "a la derecha"),
        *("hacia la derecha", "a destra", "verso destra", "naar rechts"),
    ),
    Action.LEFT: (
        *("left", "left", "to the left", "leftwards", "right to left", "from right to left", "r-l", "r->l"),
        *("r to l", "<-", "<--", "<---", "<=", "←", "⬅️", "⬅", "<<", "<<<", "left side", "goes to the left edge"),
        *("nach links", "geht nach links", "links", "à gauche", "vers la gauche", "va à gauche", "a la izquierda"),
        *("hacia la izquierda", "a sinistra", "verso sinistra", "naar links"),
    ),
    Action.UP: (
        *("up", "up", "upwards", "to the top", "bottom to top", "takes off", "take off", "lifts off", "↑", "⬆️", "⬆"),
        *("^^^", "nach oben", "hoch", "steigt", "vers le haut", "monte", "hacia arriba", "sube", "in alto", "sale"),
        *("omhoog", "levitates", "ascends", "ascending", "soars", "soaring", "lifted up"),
    ),
    Action.DOWN: (
        *("down", "down", "downwards", "to the bottom", "top to bottom", "falls to the ground", "↓", "⬇️", "⬇"),
        *("nach unten", "runter", "vers le bas", "descend", "hacia abajo", "baja", "in basso", "scende", "omlaag"),
        *("plummets", "plummeting", "dives", "descends", "descending", "comes down", "crashes down"),
    ),
    Action.GROW: (
        *("bigger and bigger", "larger and larger", "small to big", "from small to big", "increase in size"),
        *("increases in size", "becomes huge", "gets huge", "getting huge", "got big", "size up", "more and more big"),
        *("wächst", "wird größer", "wird immer größer", "grandit", "grossit", "crece", "se agranda", "cresce"),
        *("si ingrandisce", "groeit", "bigger", "larger", "blows up", "blowing up like a balloon", "puffs up"),
    ),
    Action.SHRINK: (
        *("smaller and smaller", "tinier and tinier", "big to small", "from big to small", "decrease in size"),
        *("decreases in size", "becomes tiny", "gets tiny", "got tiny", "size down", "less and less big"),
        *("schrumpft", "wird kleiner", "wird immer kleiner", "rétrécit", "rapetisse", "encoge", "se achica"),
        *("si rimpicciolisce", "krimpt", "smaller", "shrinks away", "melts away", "fades to a tiny thing"),
    ),
    Action.BOUNCE: (
        *("up and down", "goes up and down", "boing", "boing boing", "hop hop", "up down up down", "jumpy", "bouncy"),
        *("on a trampoline", "like a rabbit", "jump jump jump", "springy", "moves up and down again and again"),
        *("hüpft", "springt", "hüpft auf und ab", "rebondit", "saute", "rebota", "salta", "rimbalza", "stuitert"),
    ),
    Action.SPIN: (
        *("round and round", "around and around", "turn around", "turns around", "in circles", "on its axis", "🔄"),
        *("like a top", "like a windmill", "in a spin", "on the spot, turning", "makes a turn", "does a pirouette"),
        *("dreht sich", "dreht sich im kreis", "rotiert", "tourne", "tourne sur elle-même", "gira", "da vueltas"),
        *("ruota", "draait", "clockwise"),
    ),
}
_OWN_VERBS: dict[Action, dict[str, int]] = {
    Action.RIGHT: {"roll": 0},
    Action.LEFT: {},
    Action.UP: {"rise": 1, "climb": 6, "ascend": 2, "soar": 1, "lift": 1, "launch": 1, "levitate": 3},
    Action.DOWN: {
        "fall": 1,
        "drop": 6,
        "sink": 3,
        "fall down": 1,
        "drop down": 6,
        "descend": 2,
        "dive": 1,
        "plunge": 1,
    },
    Action.GROW: {
        "grow": 0,
        "expand": 3,
        "swell": 5,
        "inflate": 3,
        "enlarge": 4,
        "get bigger": 1,
        "get larger": 4,
        "become bigger": 1,
        "grow bigger": 2,
        "scale up": 0,
        "blow up": 5,
        "zoom in": 0,
    },
    Action.SHRINK: {
        "shrink": 0,
        "contract": 3,
        "dwindle": 5,
        "deflate": 3,
        "get smaller": 1,
        "become smaller": 4,
        "grow smaller": 2,
        "scale down": 0,
        "diminish": 5,
        "reduce": 0,
        "zoom out": 0,
        "vanish": 5,
    },
    Action.BOUNCE: {
        "bounce": 0,
        "jump": 2,
        "hop": 5,
        "bounce up and down": 1,
        "jump up and down": 4,
        "hop up and down": 3,
        "leap": 2,
        "skip": 5,
        "dribble": 0,
        "bob up and down": 1,
        "spring": 2,
    },
    Action.SPIN: {
        "spin": 0,
        "rotate": 1,
        "twirl": 5,
        "turn around": 2,
        "turn": 2,
        "spin around": 3,
        "turn in place": 4,
        "whirl": 5,
        "revolve": 1,
        "twist": 2,
        "pivot": 4,
        "swirl": 5,
        "gyrate": 1,
        "turn round": 2,
    },
}
_DOUBLED = frozenset({"run", "swim", "zip", "drop", "hop", "skip", "spin", "get", "bob"})
_IRREGULAR = {"go": "goes", "fly": "flies", "dash": "dashes", "march": "marches"}


def draw_motion(action: Action, rng: np.random.Generator) -> Motion:
    """A phrase for an action: a verb of its own, a verb with a direction, or something terse."""
    chance = rng.random()
    own = _OWN_VERBS[action]
    if action in MOVES and chance < 0.45:
        verb, where = (_choose(rng, options) for options in (_GOING, _DIRECTIONS[action]))
        return Motion(f"{_form(verb, rng)} {where}", action, _VERB_NUMBERS[action].get(verb, 0))
    if own and chance < 0.7:
        verb = _choose(rng, tuple(own))
        text = _form(verb, rng)
        if action is Action.RIGHT or (action in MOVES and rng.random() < 0.3):
            text += f" {_choose(rng, _DIRECTIONS[action])}" if rng.random() < 0.7 else ""
        return Motion(text, action, own[verb])
    return Motion(_choose(rng, _BARE[action]), action, 0)


def _form(verb: str, rng: np.random.Generator) -> str:
    """One of "go", "goes" and "going"; of several words the first one changes."""
    head, space, rest = verb.partition(" ")
    chance = rng.random()
    if chance < 0.36:
        return verb
    if chance < 0.68:
        ending = "es" if head.endswith(("sh", "ch")) else "s"
        return _IRREGULAR.get(head, head + ending) + space + rest
    if head in _DOUBLED:
        head += head[-1]
    return head.removesuffix("e") + "ing" + space + rest


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
