"""A sequence's blocks on their way from one pool to another.

Every run of neighbouring blocks travels as one tensor: K and V of all layers lie together in a block (MemServe,
section 4), and neighbours lie together in the pool. Where the receiver's blocks are neighbours too, the bytes go
straight into its pool; otherwise they are copied there once.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.messages.tensors import TensorRef
from common.models.causal_lm import BlockTable, KVPool
from common.tensors.errors import TensorMismatch
from common.tensors.port import Tensors


def runs_of(pool: KVPool, table: BlockTable, count: int) -> list[Tensor]:
    """The first ``count`` blocks of a sequence in place, one tensor [blocks, ...] for each run of neighbours."""
    return [pool.blocks[first : first + length] for first, length in BlockTable(table.blocks[:count]).runs]


def checksum(tensors: Sequence[Tensor]) -> int:
    """CRC-32 over their bytes in order. Takes a while, and leaves the interpreter free meanwhile."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().view(torch.uint8).reshape(-1).numpy().data, value)
    return value


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
    place = 0
    for ref in refs:
        own = list(blocks[place : place + ref.shape[0]])
        place += len(own)
        if own[-1] - own[0] == len(own) - 1 and own == sorted(own):
            await tensors.fetch(ref, into=pool.blocks[own[0] : own[0] + len(own)], deadline_s=deadline_s)
        else:
            fetched = await tensors.fetch(ref, deadline_s=deadline_s)
            pool.blocks[torch.tensor(own, device=pool.blocks.device)] = fetched
