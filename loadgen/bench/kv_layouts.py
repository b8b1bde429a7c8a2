"""Two layouts of a pool of keys and values, and in what pieces they travel (MemServe, arXiv 2406.17565, section 4).

Discrete: a block of keys and one of values for each layer of 16 tokens, as engines usually have them. Aggregated: all
layers of 16 tokens in one block. Sent by request, each block is a message of its own. Sent by layer, a discrete pool
sends that layer's blocks; an aggregated one has no such blocks, so the layer is copied out before and in afterwards.
Ours beyond the paper: aggregated blocks that are neighbours go as one message.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from common.mempool.address import BLOCK_TOKENS


class Way(StrEnum):
    """A layout, and when its pieces leave."""

    DISCRETE_BY_REQUEST = "discrete_by_request"
    DISCRETE_BY_LAYER = "discrete_by_layer"
    AGGREGATED_BY_REQUEST = "aggregated_by_request"
    AGGREGATED_BY_LAYER = "aggregated_by_layer"
    NEIGHBOURS_BY_REQUEST = "neighbours_by_request"

    @property
    def discrete(self) -> bool:
        return self in (Way.DISCRETE_BY_REQUEST, Way.DISCRETE_BY_LAYER)

    @property
    def by_layer(self) -> bool:
        return self in (Way.DISCRETE_BY_LAYER, Way.AGGREGATED_BY_LAYER)


@dataclass(frozen=True)
class Shape:
    """Of a prompt's keys and values, in float32, and the device that has them and computes."""

    prompt_tokens: int
    layers: int
    heads: int
    head_dim: int
    device: str = "cpu"

    @property
    def blocks(self) -> int:
        """How many groups of 16 tokens there are."""
        return -(-self.prompt_tokens // BLOCK_TOKENS)

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return self.blocks * BLOCK_TOKENS * self.layers * 2 * self.heads * self.head_dim * 4

    def messages(self, way: Way) -> int:
        """How many tensors a prompt travels in."""
        match way:
            case Way.DISCRETE_BY_REQUEST | Way.DISCRETE_BY_LAYER:
                return 2 * self.layers * self.blocks
            case Way.AGGREGATED_BY_REQUEST:
                return self.blocks
            case Way.AGGREGATED_BY_LAYER:
                return self.layers
            case Way.NEIGHBOURS_BY_REQUEST:
                return 1


class Pool:
    """One prompt's blocks among twice as many, so that they need not be neighbours. Several may share memory, in turn.

    Attributes:
        memory: [layers, 2, blocks, 16, heads, head_dim] discrete, [blocks, 16, layers, 2, heads, head_dim] otherwise.
        blocks: the prompt's, in order.
    """

    def __init__(self, way: Way, shape: Shape, memory: Tensor, reversed_order: bool) -> None:
        """reversed_order: the last block first, so that sender and receiver have theirs in other places."""
        self._way = way
        self._shape = shape
        count, heads = 2 * shape.blocks, (shape.heads, shape.head_dim)
        if way.discrete:
            self.memory = memory.view(shape.layers, 2, count, BLOCK_TOKENS, *heads)
        else:
            self.memory = memory.view(count, BLOCK_TOKENS, shape.layers, 2, *heads)
        step = 1 if way is Way.NEIGHBOURS_BY_REQUEST else 2
        order = range(0, step * shape.blocks, step)
        self.blocks: Sequence[int] = order[::-1] if reversed_order and step == 2 else order

    @staticmethod
    def memory_for(shape: Shape) -> Tensor:
        """Flat, and touched."""
        return torch.zeros(2 * shape.size_bytes // 4, device=shape.device)

    def fill(self) -> None:
        """With numbers that say their place, the same in every layout."""
        shape = self._shape
        size = (shape.layers, 2, shape.blocks, BLOCK_TOKENS, shape.heads, shape.head_dim)
        numbers = torch.arange(shape.size_bytes // 4, dtype=torch.float32, device=shape.device).view(size)
        self._view()[:, :, list(self.blocks)] = numbers

    def holds_what_was_filled(self) -> bool:
        """Whether all of it has come, each to its place."""
        numbers = self._view()[:, :, list(self.blocks)].reshape(-1)
        return torch.equal(numbers, torch.arange(numbers.numel(), dtype=torch.float32, device=numbers.device))

    def pieces(self, layer: int | None, first: int = 0, most: int | None = None) -> list[Tensor]:
        """What travels of one layer, or of all (None): tensors in place, to be sent or received into.

        Of an aggregated pool one layer has no place of its own: see ``copy_out``. ``first``, ``most``: these alone.
        """
        end = None if most is None else first + most
        return [self.memory[place] for place in itertools.islice(self._places(layer), first, end)]

    def _places(self, layer: int | None) -> Iterable[int | slice | tuple[int, ...]]:
        """Of the pieces, in memory."""
        if self._way.discrete:
            layers = range(self._shape.layers) if layer is None else (layer,)
            return itertools.product(layers, (0, 1), self.blocks)
        if self._way is Way.NEIGHBOURS_BY_REQUEST:
            return (slice(self.blocks[0], self.blocks[-1] + 1),)
        return self.blocks

    def copy_out(self, layer: int) -> Tensor:
        """A copy of one layer of an aggregated pool: [blocks, 16, 2, heads, head_dim]."""
        return self.memory[list(self.blocks), :, layer].contiguous()

    def copy_in(self, layer: int, copied: Tensor) -> None:
        """The other end of ``copy_out``."""
        self.memory[list(self.blocks), :, layer] = copied
        if copied.is_cuda:
            torch.cuda.current_stream(copied.device).synchronize()

    def _view(self) -> Tensor:
        """[layers, 2, blocks, 16, heads, head_dim] of whatever layout."""
        return self.memory if self._way.discrete else self.memory.permute(2, 3, 0, 1, 4, 5)
