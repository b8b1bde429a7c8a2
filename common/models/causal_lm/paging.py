"""Where keys and values lie: blocks of 16 tokens in one pool, each block one contiguous piece of memory.

MemServe, figure 5: K and V of all layers of a token group are one aggregated block, so that moving a block is one
transfer. Inside a block the order is tokens, layers, K and V, heads: the distance from one token to the next is the
same inside a block and across two neighbouring ones, so a sequence whose blocks are neighbours is, for each layer, one
strided tensor that attention kernels read in place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.memory import on_large_pages

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a model's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return BLOCK_TOKENS * self.token_bytes

    def blocks_in(self, pool_bytes: int) -> int:
        """How many blocks fit into so many bytes."""
        return pool_bytes // self.block_bytes

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens of one sequence take."""
        return -(-tokens // BLOCK_TOKENS)


class KVPool:
    """The memory of the blocks.

    Attributes:
        blocks: [blocks, 16, layers, 2, kv_heads, head_dim]; ``blocks[b]`` is contiguous.
        layers: for each layer a view [blocks * 16, 2, kv_heads, head_dim] of it; the first index is a token's slot,
            block * 16 + place in the block.
    """

    def __init__(self, layout: KVLayout, blocks: int, device: str | torch.device = "cpu") -> None:
        self.layout = layout
        shape = (blocks, BLOCK_TOKENS, layout.layers, 2, layout.kv_heads, layout.head_dim)
        # Zeros, and so touched once here: what a masked kernel reads beyond a sequence's end must be finite.
        if torch.device(device).type == "cpu":
            self.blocks = on_large_pages(shape, layout.dtype).zero_()
        else:
            self.blocks = torch.zeros(shape, dtype=layout.dtype, device=device)
        flat = self.blocks.view(blocks * BLOCK_TOKENS, *shape[2:])
        self.layers: list[Tensor] = [flat[:, layer] for layer in range(layout.layers)]

    @classmethod
    def of_bytes(cls, layout: KVLayout, pool_bytes: int, device: str | torch.device = "cpu") -> "KVPool":
        """A pool of at most so many bytes. Raises ValueError if not one block fits."""
        count = layout.blocks_in(pool_bytes)
        if not count:
            raise ValueError(f"a pool of {pool_bytes} bytes holds no block of {layout.block_bytes} bytes")
        return cls(layout, count, device)


class BlockTable:
    """The blocks of one sequence in order, and the runs of neighbours among them.

    Attributes:
        blocks: the numbers of the blocks.
        runs: (first block, number of blocks) of each maximal run of neighbours, in the sequence's order.
    """

    __slots__ = ("blocks", "runs")

    def __init__(self, blocks: Iterable[int] = ()) -> None:
        self.blocks: list[int] = []
        self.runs: list[tuple[int, int]] = []
        self.extend(blocks)

    @property
    def tokens(self) -> int:
        """For how many tokens there is room."""
        return len(self.blocks) * BLOCK_TOKENS

    def extend(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self.runs and sum(self.runs[-1]) == block:
                self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + 1)
            else:
                self.runs.append((block, 1))
            self.blocks.append(block)

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """The positions from `start` up to `end` as ranges of slots (first, one past the last), in order."""
        found: list[tuple[int, int]] = []
        position = 0
        for block, count in self.runs:
            low, high = max(start, position), min(end, position + count * BLOCK_TOKENS)
            if low < high:
                offset = block * BLOCK_TOKENS - position
                found.append((low + offset, high + offset))
            position += count * BLOCK_TOKENS
        return found


def slots_of(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Every slot of the ranges, in order."""
    return [slot for first, end in spans for slot in range(first, end)]
