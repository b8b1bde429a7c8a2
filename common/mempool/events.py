"""What a pool tells of its index, so that somebody elsewhere can know what it has (ours, for MemServe's section 6)."""

from dataclasses import dataclass
from enum import Enum, auto


class Change(Enum):
    """What happened to the index."""

    INSERTED = auto()
    EVICTED = auto()


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """The index's content has changed. What moves from tier to tier is no change.

    Attributes:
        number: counts the pool's events from 1, so that a gap is noticed.
        tokens: packed, whole blocks: what is known now; or what is known no more, with all that begins with it.
        kept_tokens: how many of them, from the first on, are known after the change.
    """

    number: int
    change: Change
    tokens: bytes
    kept_tokens: int
