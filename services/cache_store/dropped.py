"""What was dropped, and when: so that a cache store that was away meanwhile does not bring it back.

Of two statements about a key the later counts: what was stored after a drop stays. The clocks of two cache stores may
thus differ by less than the time from a store to the drop of the same key, which is a video's life.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

REMEMBERED_S = 7200.0
"""Longer than any pin: what a cache store that was away longer still has is not pinned any more, and goes in time."""

MOST = 65536


class Dropped:
    """When each key was dropped last, in Unix seconds. The oldest are forgotten."""

    def __init__(self) -> None:
        self._at_s: OrderedDict[str, float] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(self._at_s.items())

    def note(self, key: str, at_s: float) -> None:
        """``key`` was dropped at ``at_s``."""
        self._at_s[key] = max(at_s, self._at_s.pop(key, 0.0))
        if len(self._at_s) > MOST:
            self._at_s.popitem(last=False)

    def at_s(self, key: str) -> float | None:
        """When ``key`` was dropped, if that is known."""
        return self._at_s.get(key)

    def forget(self, before_s: float) -> None:
        """Forget what was dropped before then."""
        for key in [key for key, at_s in self._at_s.items() if at_s < before_s]:
            del self._at_s[key]


class DroppedFile:
    """The same, for the next life: one line of JSON for each drop, written anew when most lines are of no use.

    Not synced and not checked: what a power cut leaves half-written is left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = 0

    def read(self, now_s: float) -> Dropped:
        """What a former life wrote. Raises OSError: it cannot be read or written."""
        dropped = Dropped()
        if not self._path.exists():
            return dropped
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            entry = _entry(line)
            if entry is not None:
                dropped.note(*entry)
        dropped.forget(now_s - REMEMBERED_S)
        self.rewrite(tuple(dropped))
        return dropped

    @property
    def overgrown(self) -> bool:
        """Whether it is time for `rewrite`."""
        return self._lines > 2 * MOST

    def append(self, key: str, at_s: float) -> None:
        """Raises OSError: the disk did not take it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(key, at_s))
        self._lines += 1

    def rewrite(self, entries: tuple[tuple[str, float], ...]) -> None:
        """Raises OSError: the disk did not take it; the file is as it was."""
        temporary = self._path.with_suffix(".part")
        temporary.write_text("".join(_line(*entry) for entry in entries), encoding="utf-8")
        temporary.replace(self._path)
        self._lines = len(entries)


def _line(key: str, at_s: float) -> str:
    return json.dumps([key, at_s]) + "\n"


def _entry(line: str) -> tuple[str, float] | None:
    try:
        key, at_s = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (key, float(at_s)) if isinstance(key, str) and isinstance(at_s, int | float) else None
