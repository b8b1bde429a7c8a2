"""Numbers on the command line that only make sense from some value on: types for ``argparse``."""

import argparse

_WIDTH_STEP = 16

HEAD_WIDTH = 64
"""Of a head, where a model is as wide as its heads together."""


def count(text: str) -> int:
    """A whole number of 1 or more. Raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def several(text: str) -> int:
    """As many readings as have a spread, 2 or more. Raises argparse.ArgumentTypeError."""
    if count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give 2 or more")
    return int(text)


def width(text: str) -> int:
    """Channels of a random model: its eight heads turn pairs of them. Raises argparse.ArgumentTypeError."""
    return _multiple(text, _WIDTH_STEP)


def width_of_heads(text: str) -> int:
    """Channels of a random model with one head for each ``HEAD_WIDTH`` of them. Raises argparse.ArgumentTypeError."""
    return _multiple(text, HEAD_WIDTH)


def not_negative(text: str) -> int:
    """A whole number of 0 or more, as seeds are. Raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return int(text)


def _multiple(text: str, step: int) -> int:
    if count(text) % step:
        raise argparse.ArgumentTypeError(f"{text}: give a multiple of {step}")
    return int(text)
