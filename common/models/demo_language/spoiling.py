"""How people mistype: letters swapped, lost, doubled or missed by one key, spaces and vowels lost, words said twice."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_LEAST_LETTERS = 4


def choose(rng: np.random.Generator, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of the options; weights, if given, sum to one."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[min(bisect(list(accumulate(weights)), rng.random()), len(options) - 1)]


def made_up_word(rng: np.random.Generator) -> str:
    return "".join(_LETTERS[index] for index in rng.integers(len(_LETTERS), size=int(rng.integers(3, 9))))


def spoil(text: str, rng: np.random.Generator) -> str:
    """The text as a hasty writer types it; most texts come through whole."""
    words = text.split(" ")
    chance = rng.random()
    if chance < 0.16:
        words = _mistype(words, 1, rng)
    elif chance < 0.20:
        words = _mistype(words, 3, rng)
    elif chance < 0.23:
        words = [_without_vowels(word) for word in words]
    if rng.random() < 0.08:
        words = [word.strip(",.:;!?") or word for word in words]
    if rng.random() < 0.04:
        shout = choose(rng, ("!", "!!", "!!!", "?", "??", ".", "...", ",", ";", " -", " |"))
        words = [word + shout for word in words]
    if len(words) > 1 and rng.random() < 0.03:
        index = int(rng.integers(len(words) - 1))
        words[index : index + 2] = [words[index] + words[index + 1]]
    if rng.random() < 0.03:
        index = int(rng.integers(len(words)))
        words.insert(index, words[index])
    return " ".join(words)


def _without_vowels(word: str) -> str:
    short = word[0] + "".join(letter for letter in word[1:] if letter not in "aeiou") if word else word
    return short if len(short) > 1 else word


def _mistype(words: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Mistype up to `count` words that are long enough to be known again."""
    able = [index for index, word in enumerate(words) if word.isalpha() and len(word) >= _LEAST_LETTERS]
    for index in rng.permutation(able)[:count] if able else ():
        words[index] = mistyped(words[index], rng)
    return words


def mistyped(word: str, rng: np.random.Generator) -> str:
    """The word, of four letters or more, with one mistake that is not in its first letter if it is short."""
    first = 1 if len(word) < 6 else 0
    place = int(rng.integers(first, len(word) - 1))
    kind = int(rng.integers(5))
    if kind == 0:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:
        return word[: place + 1] + word[place + 2 :]
    if kind == 2:
        return word[:place] + word[place] * int(rng.integers(2, 5)) + word[place + 1 :]
    if kind == 3:
        return word[:place] + choose(rng, _LETTERS) + word[place:]
    return word[:place] + _neighbour(word[place], rng) + word[place + 1 :]


def _neighbour(letter: str, rng: np.random.Generator) -> str:
    """A letter beside this one on the keyboard; others stay."""
    for row in _KEYBOARD:
        if (place := row.find(letter)) >= 0:
            return choose(rng, row[max(0, place - 1) : place] + row[place + 1 : place + 2])
    return letter
