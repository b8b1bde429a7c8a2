"""Tensors of blocks, fetched to where they are to lie."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from common.mempool.tiers import runs_of
from common.messages.tensors import TensorRef
from common.tensors.port import Tensors

B = TypeVar("B")


def blocks_of_each(refs: Sequence[TensorRef], blocks: Sequence[B]) -> Iterator[Sequence[B]]:
    """Of blocks that tensors [n, ...] are for, in order: the n of each."""
    first = 0
    for ref in refs:
        yield blocks[first : first + ref.shape[0]]
        first += ref.shape[0]


async def fetch_into(
    tensors: Tensors, refs: Sequence[TensorRef], places: Sequence[tuple[Tensor, Sequence[int]]], deadline_s: float
) -> None:
    """Fetch tensors [n, ...], all of one owner, each to n blocks of a memory [blocks, ...].

    Where those are neighbours the bytes go straight there; otherwise they are copied there once.

    Raises:
        TensorError: they did not come within ``deadline_s``.
    """
    straight = [_if_neighbours(memory, blocks) for memory, blocks in places]
    fetched = await tensors.fetch_all(refs, straight, deadline_s=deadline_s)
    for (memory, blocks), there, came in zip(places, straight, fetched, strict=True):
        if there is None:
            memory[torch.tensor(blocks, device=memory.device)] = came.to(memory.device)


def _if_neighbours(memory: Tensor, blocks: Sequence[int]) -> Tensor | None:
    runs = runs_of(blocks)
    return memory[runs[0][0] : sum(runs[0])] if len(runs) == 1 else None
