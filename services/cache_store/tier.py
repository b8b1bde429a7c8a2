"""What a tier of bounded size keeps: least recently used goes first, pinned does not go. Pure: the time is an argument.

A tier knows keys and sizes, not bytes; whoever owns the bytes follows its answers.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass


class TierFull(Exception):
    """What is not pinned would not make room enough."""


@dataclass(frozen=True, slots=True)
class Held:
    """One key's place in a tier. Times are Unix seconds; a pin holds across restarts.

    ``stored_at_s``: when this version was stored first, in whichever cache store. ``checksum``: the CRC-32 that it was
    stored with, for whoever finds it.
    """

    version: int
    size_bytes: int
    pinned_until_s: float = 0.0
    stored_at_s: float = 0.0
    checksum: int | None = None


class Tier:
    """Keys in order of use, together never above ``capacity_bytes``."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._used_bytes = 0
        self._changed: Callable[[str], None] = _nothing

    def __len__(self) -> int:
        return len(self._held)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def listen(self, changed: Callable[[str], None]) -> None:
        """Have ``changed`` called with each key that comes, goes or gets another version from now on."""
        self._changed = changed

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def held(self, key: str) -> Held | None:
        return self._held.get(key)

    def admit(self, key: str, held: Held, now_s: float) -> list[str]:
        """Keep ``key`` as the one used last, in place of what is held under it; returns the keys evicted for it.

        Raises:
            TierFull: there is no room for it; nothing has changed.
        """
        evicted = self._victims(key, held.size_bytes, now_s)
        for each in [key, *evicted]:
            self.remove(each)
        self._held[key] = held
        self._used_bytes += held.size_bytes
        self._changed(key)
        return evicted

    def check_room(self, key: str, size_bytes: int, now_s: float) -> None:
        """Raises TierFull where ``admit`` would."""
        self._victims(key, size_bytes, now_s)

    def evicts(self, key: str, size_bytes: int, now_s: float) -> bool:
        """Whether ``admit`` would evict anything, or raise TierFull."""
        try:
            return bool(self._victims(key, size_bytes, now_s))
        except TierFull:
            return True

    def used(self, key: str) -> None:
        """Note that ``key`` was asked for."""
        if key in self._held:
            self._held.move_to_end(key)

    def remove(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._used_bytes -= held.size_bytes
            self._changed(key)

    def _victims(self, key: str, size_bytes: int, now_s: float) -> list[str]:
        replaced = self._held.get(key)
        excess_bytes = self._used_bytes + size_bytes - self._capacity_bytes
        excess_bytes -= replaced.size_bytes if replaced is not None else 0
        victims: list[str] = []
        for other, held in self._held.items():
            if excess_bytes <= 0:
                break
            if other != key and held.pinned_until_s <= now_s:
                victims.append(other)
                excess_bytes -= held.size_bytes
        if excess_bytes > 0:
            raise TierFull(
                f"{size_bytes} bytes under {key!r} do not fit into {self._capacity_bytes} beside what is pinned"
            )
        return victims


def _nothing(key: str) -> None:
    """Nobody listens."""
