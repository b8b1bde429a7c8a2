"""Messages that are no idea for a video, and the short answers to them: one answer for each kind of message."""

from dataclasses import dataclass

import numpy as np

from common.models.demo_language.spoiling import spoil


@dataclass(frozen=True)
class Talk:
    """A kind of message: ways to say it (`{x}` stands for any of `_MATTERS`), and the one answer."""

    answer: str
    messages: tuple[str, ...]


_ONLY_CAPTIONS = 'I only turn ideas for a video into captions. Try "ball go right, red".'

TALKS: dict[str, Talk] = {
    "greeting": Talk(
        "Hello! I am the demo language model of Triptych. Tell me an idea for a video, and I turn it into a caption.",
        (
            *("hello", "hi", "hey", "hello!", "hi there", "hey there", "hello there", "good morning", "good evening"),
            *("good afternoon", "greetings", "yo", "hi!", "hello, how do you do?", "hallo", "bonjour", "hola", "ciao"),
            *("hello world", "hey!", "hiya", "good day", "hello?", "hi, anyone there?", "test", "ping", "hello hello"),
        ),
    ),
    "identity": Talk(
        "I am the small demo language model of Triptych. I turn ideas into captions for its demo video model.",
        (
            *("who are you?", "who are you", "what are you?", "what is your name?", "what's your name", "your name?"),
            *("which model are you?", "what model is this?", "are you a robot?", "are you chatgpt?", "are you human?"),
            *("introduce yourself", "tell me about yourself", "who made you?", "who am i talking to?", "what is this?"),
            *("what is triptych?", "are you an ai?", "hi, who are you?", "hello, what are you?", "wer bist du?"),
            *("qui es-tu?", "how big are you?", "how many parameters do you have?", "where do you come from?"),
        ),
    ),
    "ability": Talk(
        'I turn a terse idea, such as "ball go right, red", into a caption that the demo video model understands.',
        (
            *("what can you do?", "what can you do", "what do you do?", "help", "help me", "how can you help me?"),
            *("what are you for?", "what are you good at?", "how do you work?", "how does this work?", "usage"),
            *("what should i do?", "how do i use you?", "what can i ask?", "what can i ask you?", "can you help me?"),
            *("what is your purpose?", "tell me what you can do", "your skills?", "what do you know?", "/help", "info"),
            *("instructions please", "explain what you do", "i need help", "hi, what can you do?"),
        ),
    ),
    "example": Talk(
        'For example: "ball go right, red", "tiny blue star spin", or "box falls".',
        (
            *("example", "an example", "give me an example", "an example please", "show me an example"),
            *("for example?", "examples?"),
            *("can you give an example?", "any ideas?", "what should i write?", "what shall i type?"),
            *("suggest something",),
            *("inspire me", "i have no idea", "i don't know what to write", "tell me an idea", "sample"),
        ),
    ),
    "colours": Talk(
        "Red, orange, yellow, green, cyan, blue, purple and white.",
        (
            *("which colours do you know?", "what colors do you know?", "which colours are there?", "colours?"),
            *("list the colors", "what colours can i use?", "which colors can you do?", "name the colours", "colors"),
        ),
    ),
    "shapes": Talk(
        "Circles, squares, triangles and stars.",
        (
            *("which shapes do you know?", "what shapes do you know?", "which shapes are there?", "shapes?"),
            *("list the shapes", "what shapes can i use?", "which shapes can you do?", "name the shapes", "shapes"),
        ),
    ),
    "actions": Talk(
        "Moving right, left, up or down, growing, shrinking, bouncing and spinning.",
        (
            *("which motions do you know?", "what actions do you know?", "which movements are there?", "motions?"),
            *("list the actions", "what motions can i use?", "which actions can you do?", "name the motions"),
            *("actions",),
            *("what can a shape do?", "what can shapes do?"),
        ),
    ),
    "wellbeing": Talk(
        "I am well, thank you. What should the video show?",
        (
            *("how are you?", "how are you", "how are you doing?", "how's it going?", "what's up?", "are you ok?"),
            *("how do you feel?", "wie geht's?", "ça va?", "hello, how are you?", "hi, how are you doing?", "sup"),
        ),
    ),
    "thanks": Talk(
        "You are welcome!",
        (
            *("thanks", "thank you", "thank you!", "thx", "thanks a lot", "thank you very much", "many thanks"),
            *("great",),
            *("well done", "good job", "nice, thanks", "perfect, thank you", "cool", "danke", "merci", "gracias"),
        ),
    ),
    "goodbye": Talk(
        "Goodbye!",
        (
            *("bye", "goodbye", "good bye", "bye bye", "see you", "see you later", "good night", "cu", "ciao ciao"),
            *("that's all", "i am done", "farewell", "tschüss", "au revoir", "adios", "bye!", "ok bye"),
        ),
    ),
    "other": Talk(
        _ONLY_CAPTIONS,
        (
            *("what is the capital of {x}?", "tell me a joke", "tell me a joke about {x}", "write a poem about {x}"),
            *("what is {x}?", "who invented {x}?", "explain {x}", "explain {x} to me", "how old are you?", "2+2"),
            *("1+1?",),
            *("what is 2 plus 2?", "what time is it?", "what day is it?", "what is the weather like?", "translate {x}"),
            *("write code for {x}", "write a python function", "how do i cook {x}?", "do you like {x}?", "sing a song"),
            *("what do you think about {x}?", "where is {x}?", "when was {x} born?", "how much is {x}?", "why is {x}?"),
            *("tell me about {x}", "tell me a story", "write an essay about {x}", "summarise {x}", "solve x^2 = 4"),
            *("is {x} real?", "who won the world cup?", "i am sad", "i love you", "do you dream?", "are you alive?"),
            *("recommend a book about {x}", "how does {x} work?", "what is the meaning of life?", "what is love?"),
            *("define {x}", "compare {x} and {x}", "how tall is {x}?", "who is the president of {x}?", "say something"),
            *("what is the population of {x}?", "give me a recipe for {x}", "play some music", "count to ten"),
            *("can you write an email about {x}?", "what is the best {x}?", "fix my code", "continue this text: {x}"),
            *("how far is {x}?", "who wrote {x}?", "what happened in 1969?", "is it raining?", "what is a {x}?"),
        ),
    ),
}
_MATTERS = (
    *("france", "germany", "japan", "peru", "london", "python", "history", "quantum physics", "mathematics", "music"),
    *("the internet", "democracy", "gravity", "shakespeare", "einstein", "napoleon", "love", "bread", "soup", "pasta"),
    *("a computer", "a telephone", "the ocean", "the weather", "money", "the universe", "chess", "tea", "coffee"),
    *("language models", "transformers", "attention", "electricity", "biology", "economics", "poetry"),
    *("photosynthesis",),
    *("my homework", "this text", "linux", "a database", "an operating system", "climate change", "philosophy"),
)


@dataclass(frozen=True)
class Exchange:
    """One message and its answer; `kind` is the key in `TALKS`."""

    kind: str
    message: str
    answer: str


def draw_talk(rng: np.random.Generator) -> Exchange:
    """A message that is no idea, with its answer."""
    kinds = tuple(TALKS)
    kind = "other" if rng.random() < 0.3 else kinds[int(rng.integers(len(kinds)))]
    messages = TALKS[kind].messages
    message = messages[int(rng.integers(len(messages)))]
    while "{x}" in message:
        message = message.replace("{x}", _MATTERS[int(rng.integers(len(_MATTERS)))], 1)
    if rng.random() < 0.4:
        message = message.rstrip("?!") + ("", "?", "!", " please", "...", ".")[int(rng.integers(6))]
    return Exchange(kind, spoil(message, rng), TALKS[kind].answer)
