"""HTTP byte ranges (RFC 9110, section 14), for files whose size is known. Pure."""

import re

_RANGE = re.compile(r"bytes=\s*([0-9]*)\s*-\s*([0-9]*)\s*")
_DIGITS = 18


class Unsatisfiable(ValueError):
    """The range lies outside the file."""


def byte_range(header: str | None, size_bytes: int) -> range | None:
    """The bytes asked for; None for all of them.

    What is malformed, or asks for several ranges, is answered with the whole file, as the RFC allows.

    Raises:
        Unsatisfiable: well-formed, but nothing of it is in the file.
    """
    parsed = _RANGE.fullmatch(header or "")
    if parsed is None:
        return None
    first, last = parsed.groups()
    if not first and not last:
        return None
    if max(len(first), len(last)) > _DIGITS:
        first, last = first[:_DIGITS], last[:_DIGITS]
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(size_bytes, int(last) + 1 if last else size_bytes)
        if last and int(last) < int(first):
            return None
    if start >= end:
        raise Unsatisfiable(f"{header} of {size_bytes} bytes")
    return range(start, end)
