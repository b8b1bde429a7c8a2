"""The books of one instance's KV blocks: who holds which, and which may be used again.

MemServe, section 4.1 (``alloc_mem``, ``free_mem``): blocks of one size, given out all or nothing. Ours beyond that: a
block has as many holders as sequences share it. It carries an epoch, which grows each time it is given out, so that a
reference from an earlier life is recognized. And a block that somebody still writes to or reads from when its last
holder lets go is set aside until they are done, so that no late write ever lands in another sequence's memory.

Sequences are laid out so that their blocks are neighbours where possible: attention then reads them in place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


class WrongBlock(Exception):
    """A block that is not held was shared, released or accessed: the caller's books are wrong."""


@dataclass(frozen=True, slots=True)
class Access:
    """A write or read under way, from ``begin_access`` to ``end_access``: the blocks, and their epochs then."""

    blocks: tuple[int, ...]
    epochs: tuple[int, ...]


class BlockAllocator:
    """Blocks 0 to `blocks` - 1 are always each in one of three states: free, held, or set aside.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"{blocks} blocks are no pool")
        self._free = np.ones(blocks, dtype=np.bool_)
        self._holders = np.zeros(blocks, dtype=np.int32)
        self._accesses = np.zeros(blocks, dtype=np.int32)
        self._epochs = np.zeros(blocks, dtype=np.int64)
        self._indexed = np.zeros(blocks, dtype=np.bool_)
        self._free_blocks = blocks

    @property
    def blocks(self) -> int:
        return len(self._free)

    @property
    def free_blocks(self) -> int:
        """How many could be given out now."""
        return self._free_blocks

    @property
    def held_blocks(self) -> int:
        return int(np.count_nonzero(self._holders))

    @property
    def set_aside_blocks(self) -> int:
        """How many have no holder any more and wait for the end of an access."""
        return self.blocks - self.free_blocks - self.held_blocks

    @property
    def indexed_blocks(self) -> int:
        """How many the index holds, whoever else does."""
        return int(np.count_nonzero(self._indexed))

    @property
    def idle_blocks(self) -> int:
        """How many only the index holds, and nobody accesses."""
        return int(np.count_nonzero(self._indexed & (self._holders == 1) & (self._accesses == 0)))

    def is_idle(self, block: int) -> bool:
        """Whether the index alone holds it, and nobody accesses it."""
        return bool(self._indexed[block]) and self._holders[block] == 1 and not self._accesses[block]

    def epoch(self, block: int) -> int:
        """How often the block has been given out."""
        return int(self._epochs[block])

    def is_current(self, block: int, epoch: int) -> bool:
        """Whether a reference made in that epoch still means what it meant."""
        return bool(self._holders[block]) and self.epoch(block) == epoch

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Give out `count` blocks, or none at all.

        Args:
            after: the last block that the sequence has: it goes on there if that is free.

        Returns:
            The blocks in the order to use them; None if there are not enough.
        """
        if count > self._free_blocks:
            return None
        found: list[int] = []
        if after is not None:
            found = self._following(after + 1, count)
            self._free[found] = False
        if len(found) < count:
            found += self._in_gaps(count - len(found))
            self._free[found] = False
        self._holders[found] = 1
        self._epochs[found] += 1
        self._free_blocks -= count
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for each. Raises WrongBlock, and changes nothing, if one is not held."""
        self._check_held(blocks)
        for block in blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. Raises WrongBlock, and changes nothing, if one is not held."""
        self._check_held(blocks)
        for block in blocks:
            self._holders[block] -= 1
            self._free_if_idle(block)

    def index(self, blocks: Sequence[int]) -> None:
        """The index of historical KV holds them from now on, beside their other holders. Raises: see ``share``."""
        if self._indexed[list(blocks)].any():
            raise WrongBlock(f"of blocks {list(blocks)}, some are in the index")
        self.share(blocks)
        self._indexed[list(blocks)] = True

    def unindex(self, blocks: Sequence[int]) -> None:
        """It lets go of them. Raises: WrongBlock, and changes nothing, if it does not hold one."""
        if not self._indexed[list(blocks)].all():
            raise WrongBlock(f"of blocks {list(blocks)}, some are not in the index")
        self._indexed[list(blocks)] = False
        self.release(blocks)

    def begin_access(self, blocks: Iterable[int]) -> Access:
        """A write to them or a read from them starts. Raises WrongBlock if one is not held."""
        named = tuple(blocks)
        self._check_held(named)
        for block in named:
            self._accesses[block] += 1
        return Access(named, tuple(self.epoch(block) for block in named))

    def end_access(self, access: Access) -> None:
        """It is over. Raises WrongBlock if no access to these blocks is under way."""
        pairs = zip(access.blocks, access.epochs, strict=True)
        if any(self._accesses[block] < 1 or self.epoch(block) != epoch for block, epoch in pairs):
            raise WrongBlock(f"no access to {access.blocks} is under way")
        for block in access.blocks:
            self._accesses[block] -= 1
            self._free_if_idle(block)

    def _check_held(self, blocks: Sequence[int]) -> None:
        wrong = [block for block in blocks if not 0 <= block < self.blocks or not self._holders[block]]
        if wrong or len(set(blocks)) != len(blocks):
            raise WrongBlock(f"of blocks {list(blocks)}, {wrong or 'some twice'} are not held")

    def _free_if_idle(self, block: int) -> None:
        if not self._holders[block] and not self._accesses[block]:
            self._free[block] = True
            self._free_blocks += 1

    def _following(self, first: int, count: int) -> list[int]:
        """The free blocks from `first` on without a gap, at most `count`."""
        window = self._free[first : first + count]
        length = len(window) if window.all() else int(window.argmin())
        return list(range(first, first + length))

    def _in_gaps(self, count: int) -> list[int]:
        """Free blocks in as few runs as possible, with room behind them and behind what is there already.

        In the middle of the largest gap both the sequence before the gap and the new one can grow in place.
        """
        padded = np.concatenate(([False], self._free, [False]))
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, ends = edges[::2], edges[1::2]
        order = np.argsort(starts - ends, kind="stable")
        found: list[int] = []
        for gap in order:
            start, end = int(starts[gap]), int(ends[gap])
            length = min(count - len(found), end - start)
            if start and length < end - start:
                start += (end - start - length) // 2
            found += range(start, start + length)
            if len(found) == count:
                break
        return found
