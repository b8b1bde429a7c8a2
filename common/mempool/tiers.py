"""The memory that a pool's blocks lie in: one tier for each medium, each with its own books.

MemServe has HBM and DRAM; the disk is ours. A tier is a tensor of blocks, wherever that lies: a disk's is a
file mapped into memory, which is nobody's once the process has ended.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from common.mempool.address import Address, Medium
from common.mempool.allocator import Access, BlockAllocator


@dataclass(frozen=True, slots=True)
class Tier:
    """``memory``: [blocks, ...], each block contiguous."""

    medium: Medium
    memory: Tensor
    allocator: BlockAllocator

    @classmethod
    def over(cls, memory: Tensor, medium: Medium = Medium.HBM, allocator: BlockAllocator | None = None) -> "Tier":
        """A tier of memory that is there already. ``allocator``: its books, if some of it is given out."""
        return cls(medium, memory, allocator or BlockAllocator(len(memory)))

    def copy_to(self, other: "Tier", source: Sequence[int], target: Sequence[int]) -> None:
        """Copy blocks of this tier to as many of another one, or of this one."""
        read = self.memory[torch.tensor(source, device=self.memory.device)]
        other.memory[torch.tensor(target, device=other.memory.device)] = read.to(other.memory.device)


def memory_of(tiers: Mapping[Medium, Tier], addresses: Sequence[Address]) -> list[Tensor]:
    """The memory of blocks, in order: [n, ...] for each run of neighbours."""
    return [
        tiers[medium].memory[first : first + count]
        for medium, group in groupby(addresses, key=lambda address: address.medium)
        for first, count in runs_of([address.block for address in group])
    ]


def begin_access(tiers: Mapping[Medium, Tier], addresses: Sequence[Address]) -> list[tuple[Medium, Access]]:
    """A write to blocks or a read from them starts; see ``BlockAllocator``."""
    return [
        (medium, tiers[medium].allocator.begin_access([address.block for address in group]))
        for medium, group in groupby(addresses, key=lambda address: address.medium)
    ]


def end_access(tiers: Mapping[Medium, Tier], accesses: Sequence[tuple[Medium, Access]]) -> None:
    """It is over."""
    for medium, access in accesses:
        tiers[medium].allocator.end_access(access)


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def dram_tier(like: Tensor, tier_bytes: int) -> Tier | None:
    """A tier in the host's memory for blocks like those of ``like`` [blocks, ...]; None: not one fits.

    Beside a GPU it is pinned, so that copies need no detour.
    """
    blocks = _fitting(like, tier_bytes)
    if not blocks:
        return None
    memory = torch.zeros((blocks, *like.shape[1:]), dtype=like.dtype, pin_memory=like.is_cuda)
    return Tier.over(memory, Medium.DRAM)


def disk_tier(like: Tensor, tier_bytes: int, folder: Path) -> Tier | None:
    """A tier in a new file under ``folder``; None: not one block fits. The file has no name, so it ends with us.

    Raises:
        OSError: there is no such folder, or no room in it.
    """
    blocks = _fitting(like, tier_bytes)
    if not blocks:
        return None
    size = blocks * _block_bytes(like)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="triptych-kv-") as file:
        # All of it now: writing to a mapped file when the disk is full would kill the process.
        os.posix_fallocate(file.fileno(), 0, size)
        flat = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
    return Tier.over(flat.view(like.dtype).view(blocks, *like.shape[1:]), Medium.DISK)


def _block_bytes(like: Tensor) -> int:
    return like[0].numel() * like.element_size()


def _fitting(like: Tensor, tier_bytes: int) -> int:
    return tier_bytes // _block_bytes(like)
