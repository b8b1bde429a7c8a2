"""What people call the demo video model's colours, shapes and actions: synonyms, other languages, signs and things.

All in lower case, as the chat template makes every idea. Where the video model knows a word of its own for what was
said ("ball", "sliding to the right"), the caption keeps it; numbers of verbs count in `captions.VERBS`.
"""

from dataclasses import dataclass

from common.models.demo.clips import Action, Scale, Shape

COLOURS: dict[str, tuple[str, ...]] = {
    "red": (
        *("red", "crimson", "scarlet", "ruby", "maroon", "pink", "rose", "reddish", "blood red", "#ff0000"),
        *("rot", "roter", "rote", "rotes", "rouge", "rojo", "roja", "rosso", "rossa", "rood", "vermelho"),
    ),
    "orange": (
        *("orange", "tangerine", "amber", "brown", "copper", "peach", "orangey", "#ffa500"),
        *("oranger", "orangener", "naranja", "anaranjado", "arancione", "oranje", "laranja"),
    ),
    "yellow": (
        *("yellow", "gold", "golden", "mustard", "yellowish", "canary yellow", "#ffff00"),
        *("gelb", "gelber", "gelbe", "gelbes", "jaune", "amarillo", "amarilla", "giallo", "gialla", "geel"),
    ),
    "green": (
        *("green", "lime", "emerald", "olive", "jade", "mint", "greenish", "grass green", "#00ff00"),
        *("grün", "grüner", "grüne", "grünes", "gruen", "vert", "verte", "verde", "groen"),
    ),
    "cyan": (
        *("cyan", "turquoise", "teal", "aqua", "aquamarine", "sky blue", "blue-green", "#00ffff"),
        *("türkis", "türkiser", "cian", "turquesa", "turchese", "celeste", "azzurro"),
    ),
    "blue": (
        *("blue", "navy", "cobalt", "sapphire", "azure", "royal blue", "navy blue", "bluish", "#0000ff"),
        *("blau", "blauer", "blaue", "blaues", "bleu", "bleue", "azul", "blu", "blauw"),
    ),
    "purple": (
        *("purple", "violet", "magenta", "lilac", "lavender", "plum", "mauve", "indigo", "#800080"),
        *("lila", "violett", "violetter", "violette", "morado", "morada", "viola", "paars", "roxo"),
    ),
    "white": (
        *("white", "ivory", "silver", "grey", "gray", "black", "pale", "whitish", "snow white", "#ffffff"),
        *("weiß", "weißer", "weiße", "weisser", "blanc", "blanche", "blanco", "blanca", "bianco", "bianca", "wit"),
    ),
}
"""Colours outside the eight go to the nearest; black, which would not show on the dark background, to white."""

SHADES = ("dark", "light", "bright", "deep", "pale", "neon", "hot", "very")
"""Said before a colour, and lost: the video model has one tone of each."""

SHAPES: dict[Shape, tuple[str, ...]] = {
    Shape.CIRCLE: (
        *("circle", "ball", "disc", "disk", "dot", "sphere", "orb", "bubble", "marble", "globe"),
        *("round thing", "round shape", "ring", "circ", "kreis", "kugel", "punkt", "cercle", "balle", "boule", "rond"),
        *("círculo", "circulo", "pelota", "bola", "cerchio", "palla", "cirkel", "●"),
    ),
    Shape.SQUARE: (
        *("square", "box", "block", "cube", "tile", "rectangle", "sq", "quadrat", "würfel", "kasten"),
        *("squared thing", "four-sided shape", "carré", "carre", "boîte", "cuadrado", "caja", "quadrato", "scatola"),
        *("vierkant", "■"),
    ),
    Shape.TRIANGLE: (
        *("triangle", "pyramid", "wedge", "cone", "tri", "arrowhead", "three-sided shape"),
        *("dreieck", "pyramide", "triángulo", "triangulo", "pirámide", "triangolo", "driehoek", "▲"),
    ),
    Shape.STAR: (
        *("star", "starlet", "pentagram", "asterisk", "star shape", "five-pointed shape"),
        *("stern", "étoile", "etoile", "estrella", "stella", "ster", "estrela", "★"),
    ),
}

KEPT_NOUNS = {
    **dict.fromkeys(
        ("ball", "sphere", "marble", "globe", "kugel", "balle", "boule", "pelota", "bola", "palla"), "ball"
    ),
    **dict.fromkeys(("disc", "disk"), "disc"),
    **dict.fromkeys(("box", "block", "kasten", "boîte", "caja", "scatola"), "box"),
}
"""Words for which the caption does not say the shape's first name."""

SCALES: dict[Scale, tuple[str, ...]] = {
    Scale.SMALL: ("small", "little", "tiny", "mini", "wee", "teeny", "klein", "petit", "pequeño", "piccolo"),
    Scale.BIG: ("big", "large", "huge", "giant", "massive", "enormous", "groß", "grand", "grande", "fat"),
}

EMOJI: dict[str, tuple[str, Shape]] = {
    "🔴": ("red", Shape.CIRCLE),
    "🟠": ("orange", Shape.CIRCLE),
    "🟡": ("yellow", Shape.CIRCLE),
    "🟢": ("green", Shape.CIRCLE),
    "🔵": ("blue", Shape.CIRCLE),
    "🟣": ("purple", Shape.CIRCLE),
    "⚪": ("white", Shape.CIRCLE),
    "🟥": ("red", Shape.SQUARE),
    "🟧": ("orange", Shape.SQUARE),
    "🟨": ("yellow", Shape.SQUARE),
    "🟩": ("green", Shape.SQUARE),
    "🟦": ("blue", Shape.SQUARE),
    "🟪": ("purple", Shape.SQUARE),
    "⬜": ("white", Shape.SQUARE),
    "🔺": ("red", Shape.TRIANGLE),
    "⭐": ("yellow", Shape.STAR),
    "🌟": ("yellow", Shape.STAR),
}


@dataclass(frozen=True)
class Thing:
    """Something that stands for a shape in a colour; `action` is what it does where the idea does not say."""

    name: str
    colour: str
    shape: Shape
    action: Action


THINGS: tuple[Thing, ...] = (
    Thing("sun", "yellow", Shape.CIRCLE, Action.UP),
    Thing("sunrise", "orange", Shape.CIRCLE, Action.UP),
    Thing("sunset", "orange", Shape.CIRCLE, Action.DOWN),
    Thing("moon", "white", Shape.CIRCLE, Action.UP),
    Thing("full moon", "white", Shape.CIRCLE, Action.UP),
    Thing("planet", "blue", Shape.CIRCLE, Action.RIGHT),
    Thing("earth", "blue", Shape.CIRCLE, Action.RIGHT),
    Thing("mars", "red", Shape.CIRCLE, Action.RIGHT),
    Thing("apple", "red", Shape.CIRCLE, Action.DOWN),
    Thing("tomato", "red", Shape.CIRCLE, Action.RIGHT),
    Thing("cherry", "red", Shape.CIRCLE, Action.DOWN),
    Thing("lemon", "yellow", Shape.CIRCLE, Action.RIGHT),
    Thing("pumpkin", "orange", Shape.CIRCLE, Action.GROW),
    Thing("pea", "green", Shape.CIRCLE, Action.RIGHT),
    Thing("blueberry", "blue", Shape.CIRCLE, Action.BOUNCE),
    Thing("grape", "purple", Shape.CIRCLE, Action.BOUNCE),
    Thing("egg", "white", Shape.CIRCLE, Action.DOWN),
    Thing("coin", "yellow", Shape.CIRCLE, Action.DOWN),
    Thing("basketball", "orange", Shape.CIRCLE, Action.BOUNCE),
    Thing("tennis ball", "yellow", Shape.CIRCLE, Action.BOUNCE),
    Thing("football", "white", Shape.CIRCLE, Action.BOUNCE),
    Thing("golf ball", "white", Shape.CIRCLE, Action.RIGHT),
    Thing("snowball", "white", Shape.CIRCLE, Action.GROW),
    Thing("balloon", "red", Shape.CIRCLE, Action.UP),
    Thing("raindrop", "blue", Shape.CIRCLE, Action.DOWN),
    Thing("rain", "blue", Shape.CIRCLE, Action.DOWN),
    Thing("frog", "green", Shape.CIRCLE, Action.BOUNCE),
    Thing("rabbit", "white", Shape.CIRCLE, Action.BOUNCE),
    Thing("kangaroo", "orange", Shape.CIRCLE, Action.BOUNCE),
    Thing("cat", "orange", Shape.CIRCLE, Action.BOUNCE),
    Thing("dog", "orange", Shape.CIRCLE, Action.RIGHT),
    Thing("ice cube", "cyan", Shape.SQUARE, Action.SHRINK),
    Thing("dice", "white", Shape.SQUARE, Action.SPIN),
    Thing("brick", "red", Shape.SQUARE, Action.DOWN),
    Thing("crate", "orange", Shape.SQUARE, Action.RIGHT),
    Thing("gift", "red", Shape.SQUARE, Action.BOUNCE),
    Thing("present", "red", Shape.SQUARE, Action.BOUNCE),
    Thing("lift", "white", Shape.SQUARE, Action.UP),
    Thing("elevator", "white", Shape.SQUARE, Action.UP),
    Thing("train", "blue", Shape.SQUARE, Action.RIGHT),
    Thing("bus", "red", Shape.SQUARE, Action.RIGHT),
    Thing("car", "red", Shape.SQUARE, Action.RIGHT),
    Thing("taxi", "yellow", Shape.SQUARE, Action.LEFT),
    Thing("truck", "blue", Shape.SQUARE, Action.LEFT),
    Thing("house", "red", Shape.SQUARE, Action.GROW),
    Thing("robot", "cyan", Shape.SQUARE, Action.RIGHT),
    Thing("book", "purple", Shape.SQUARE, Action.DOWN),
    Thing("rocket", "red", Shape.TRIANGLE, Action.UP),
    Thing("spaceship", "cyan", Shape.TRIANGLE, Action.UP),
    Thing("plane", "white", Shape.TRIANGLE, Action.UP),
    Thing("bird", "blue", Shape.TRIANGLE, Action.UP),
    Thing("tent", "orange", Shape.TRIANGLE, Action.GROW),
    Thing("mountain", "white", Shape.TRIANGLE, Action.GROW),
    Thing("tree", "green", Shape.TRIANGLE, Action.GROW),
    Thing("christmas tree", "green", Shape.TRIANGLE, Action.SPIN),
    Thing("pizza slice", "orange", Shape.TRIANGLE, Action.SPIN),
    Thing("traffic cone", "orange", Shape.TRIANGLE, Action.BOUNCE),
    Thing("sailing boat", "white", Shape.TRIANGLE, Action.LEFT),
    Thing("shark fin", "cyan", Shape.TRIANGLE, Action.LEFT),
    Thing("snowflake", "white", Shape.STAR, Action.DOWN),
    Thing("snow", "white", Shape.STAR, Action.DOWN),
    Thing("starfish", "orange", Shape.STAR, Action.SPIN),
    Thing("shooting star", "white", Shape.STAR, Action.DOWN),
    Thing("sheriff badge", "yellow", Shape.STAR, Action.SPIN),
    Thing("firework", "red", Shape.STAR, Action.GROW),
    Thing("flower", "purple", Shape.STAR, Action.GROW),
    Thing("spark", "yellow", Shape.STAR, Action.SHRINK),
)

UNKNOWN_THINGS: tuple[str, ...] = (
    *("elephant", "dragon", "tiger", "horse", "fish", "unicorn", "dinosaur", "snake", "monkey", "bear", "duck", "cow"),
    *("wizard", "knight", "princess", "astronaut", "man", "woman", "child", "baby", "king", "pirate", "ghost"),
    *("zombie",),
    *("ship", "bike", "chair", "table", "phone", "computer", "lamp", "shoe", "hat", "cup", "bottle", "guitar", "piano"),
    *("river", "lake", "cloud", "forest", "city", "bridge", "castle", "tower", "road", "volcano", "desert", "island"),
    *("burger", "cake", "banana", "bread", "cheese", "carrot", "potato", "sandwich", "dream", "thought", "idea"),
    *("song",),
    *("thing", "object", "shape", "figure", "blob", "item", "stuff", "something", "somebody", "logo", "pixel", "heart"),
)
"""Words that tell no shape, some of those that people will try."""

USUAL_COLOUR = {Shape.CIRCLE: "red", Shape.SQUARE: "blue", Shape.TRIANGLE: "green", Shape.STAR: "yellow"}
USUAL_ACTION = {
    Shape.CIRCLE: Action.BOUNCE,
    Shape.SQUARE: Action.RIGHT,
    Shape.TRIANGLE: Action.UP,
    Shape.STAR: Action.SPIN,
}
"""What a shape is and does where an idea does not say; an idea without a shape is of a circle."""
