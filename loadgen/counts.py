"""Numbers on the command line that only make sense from some value on: types for ``argparse``."""

import argparse

_WIDTH_STEP = 16


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
    if count(text) % _WIDTH_STEP:
        raise argparse.ArgumentTypeError(f"{text}: give a multiple of {_WIDTH_STEP}")
    return int(text)
