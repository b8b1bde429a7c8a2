"""Subjects and names, checked: a token must not be able to address anything but its own place in a subject."""

import re
from functools import lru_cache

from common.bus.errors import BadAddress

_TOKEN = re.compile(r"[A-Za-z0-9_=/-]+")
_KEY = re.compile(r"[A-Za-z0-9_=/-]+(\.[A-Za-z0-9_=/-]+)*")


@lru_cache(maxsize=4096)
def address(pattern: str, tokens: tuple[str, ...]) -> str:
    """``pattern`` with each ``{}`` replaced by one token.

    Raises:
        BadAddress: a wrong number of tokens, or one with other signs than letters, digits and ``_ - = /``.
    """
    if pattern.count("{}") != len(tokens):
        raise BadAddress(f"{pattern} takes {pattern.count('{}')} tokens, got {len(tokens)}: {tokens}")
    for token in tokens:
        if not _TOKEN.fullmatch(token):
            raise BadAddress(f"{token!r} cannot stand in {pattern}: use letters, digits and _ - = / only")
    return pattern.format(*tokens)


def checked_key(key: str) -> str:
    """``key``, if it can name a value of a bucket.

    Raises:
        BadAddress: empty, or with other signs than letters, digits, ``_ - = /`` and single dots between them.
    """
    if not _KEY.fullmatch(key):
        raise BadAddress(f"{key!r} cannot be a key: use letters, digits, _ - = / and dots between them only")
    return key
