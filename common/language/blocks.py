"""A sequence's keys and values on their way from one pool to another, in parts.

A part is made of whole blocks or of single layers. Of blocks, every run of neighbours travels as one tensor: K and V of
all layers lie together in a block (MemServe, section 4), and neighbours lie together in the pool. Where the receiver's
blocks are neighbours too, the bytes go straight into its pool; otherwise they are copied there once. One layer lies
strided in the blocks, so it is copied out before and copied in after.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.mempool.checksum import checksum
from common.mempool.fetching import blocks_of_each, fetch_into
from common.messages.chat import KVPart
from common.messages.tensors import TensorRef
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, KVPool
from common.models.causal_lm.paging import slots_of
from common.tensors.errors import TensorMismatch
from common.tensors.port import Tensors


@dataclass(slots=True)
class Part:
    """What ``KVPart`` describes, where it was computed."""

    first_token: int
    tokens: int
    first_layer: int | None
    kv: list[Tensor]

    def goes_on(self, other: "Part") -> bool:
        """Whether ``other`` has the next layer of the same tokens."""
        if self.first_layer is None or (self.first_token, self.tokens) != (other.first_token, other.tokens):
            return False
        return other.first_layer == self.first_layer + len(self.kv)


def blocks_part(pool: KVPool, table: BlockTable, first_token: int, end_token: int) -> Part:
    """The tokens' blocks in place; ``first_token`` is the first of a block."""
    blocks = table.blocks[first_token // BLOCK_TOKENS : pool.layout.blocks_for(end_token)]
    return Part(first_token, end_token - first_token, None, runs_of(pool, blocks))


def layer_part(pool: KVPool, table: BlockTable, first_token: int, end_token: int, layer: int) -> Part:
    """A copy of one layer."""
    spans = [pool.layers[layer][first:end] for first, end in table.spans(first_token, end_token)]
    return Part(first_token, end_token - first_token, layer, [torch.cat(spans)])


@contextlib.asynccontextmanager
async def exported(
    tensors: Tensors, parts: Sequence[Part], lease_s: float, check: bool
) -> AsyncIterator[tuple[KVPart, ...]]:
    """Keep parts for their receiver while the block runs.

    Raises:
        TensorError: they cannot be kept.
    """
    refs: list[TensorRef] = []
    described = []
    try:
        for part in parts:
            value = await asyncio.to_thread(checksum, part.kv) if check else None
            own = tensors.export_all(part.kv, lease_s=lease_s)
            refs += own
            described.append(
                KVPart(
                    first_token=part.first_token,
                    tokens=part.tokens,
                    first_layer=part.first_layer,
                    kv=tuple(own),
                    checksum=value,
                )
            )
        yield tuple(described)
    finally:
        for ref in refs:
            await tensors.release(ref)


def runs_of(pool: KVPool, blocks: Sequence[int]) -> list[Tensor]:
    """These blocks in place, one tensor [blocks, ...] for each run of neighbours."""
    return [pool.blocks[first : first + length] for first, length in BlockTable(blocks).runs]


def bytes_in(parts: Sequence[KVPart]) -> int:
    """How many bytes they are."""
    return sum(ref.size_bytes for part in parts for ref in part.kv)


async def fetch_part(
    tensors: Tensors, pool: KVPool, part: KVPart, table: BlockTable, deadline_s: float, check: bool
) -> int | None:
    """Fetch a part to its place in the blocks of ``table``.

    Returns:
        The checksum of what came, if it is to be compared.

    Raises:
        TensorMismatch: it has another shape than the model's keys and values have here.
        TensorError: it did not come within ``deadline_s``.
    """
    if part.first_layer is None:
        first, end = part.first_token, part.first_token + part.tokens
        blocks = table.blocks[first // BLOCK_TOKENS : pool.layout.blocks_for(end)]
        await fetch_blocks(tensors, pool, part.kv, blocks, deadline_s)
        return await asyncio.to_thread(checksum, runs_of(pool, blocks)) if check else None
    return await _fetch_layers(tensors, pool, part, part.first_layer, table, deadline_s, check)


async def fetch_blocks(
    tensors: Tensors, pool: KVPool, refs: Sequence[TensorRef], blocks: Sequence[int], deadline_s: float
) -> None:
    """Fetch the tensors of ``runs_of`` into ``blocks`` of this pool, in order.

    Raises:
        TensorMismatch: the blocks have another shape here, or there are more or fewer of them.
        TensorError: they did not come within ``deadline_s``.
    """
    shape = tuple(pool.blocks.shape[1:])
    if any(ref.shape[1:] != shape for ref in refs) or sum(ref.shape[0] for ref in refs) != len(blocks):
        raise TensorMismatch(f"{[ref.shape for ref in refs]} do not fit {len(blocks)} blocks of {shape}")
    places = [(pool.blocks, own) for own in blocks_of_each(refs, blocks)]
    await fetch_into(tensors, refs, places, deadline_s)


async def _fetch_layers(
    tensors: Tensors, pool: KVPool, part: KVPart, first_layer: int, table: BlockTable, deadline_s: float, check: bool
) -> int | None:
    layers = pool.layers[first_layer : first_layer + len(part.kv)]
    shape = (part.tokens, *pool.layers[0].shape[1:])
    if len(layers) != len(part.kv) or any(ref.shape != shape for ref in part.kv):
        raise TensorMismatch(f"{[ref.shape for ref in part.kv]} are no layers of {shape} from {first_layer} on")
    anywhere = [None] * len(part.kv)
    fetched = await tensors.fetch_all(part.kv, anywhere, device=pool.blocks.device, deadline_s=deadline_s)
    spans = table.spans(part.first_token, part.first_token + part.tokens)

    def place() -> int | None:
        slots = torch.tensor(slots_of(spans), device=pool.blocks.device)
        for layer, tensor in zip(layers, fetched, strict=True):
            layer.index_copy_(0, slots, tensor)
        return checksum(fetched) if check else None

    return await asyncio.to_thread(place)
