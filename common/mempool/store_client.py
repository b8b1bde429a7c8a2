"""What instances evict, kept in the cache stores: the tier below all of an instance's own (MemServe, section 4).

Tensors of one version for ever, put and found in batches by keys that say what is in them. A cache store may forget
anything at any time, and being slow or away costs its clients the computing again, no more.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch

from common.bus.port import Bus
from common.messages.cache import MAX_BATCH, DropTensors, FindTensors, HaveTensors, StoreTensors
from common.messages.subjects import DROP_TENSORS, FIND_TENSORS, HAVE_TENSORS, STORE_TENSORS
from common.tensors.port import Tensors

# A batch of more is put in pieces, so that a cache store fetches no more than this at once.
PUT_BYTES = 64 << 20
CONTROL_DEADLINE_S = 1.0
# Beside that, at the rate of a slow disk.
BYTES_PER_S = 50e6


def prefix_keys(namespace: str, tokens: bytes, block_bytes: int) -> list[str]:
    """A key for each whole block of packed tokens, which says all tokens up to its end, as its keys and values do.

    Args:
        namespace: whatever else they depend on: the model, its revision, dtype and layout of blocks.
        tokens: packed (``common.messages.chat.pack_tokens``); what is left of a block at the end has no key.
        block_bytes: of one block's tokens.
    """
    hashed = hashlib.blake2b(digest_size=20)
    keys = []
    for start in range(0, len(tokens) - block_bytes + 1, block_bytes):
        hashed.update(tokens[start : start + block_bytes])
        keys.append(f"{namespace}/{hashed.hexdigest()}")
    return keys


class StoreClient:
    """Puts, finds and drops tensors by key. All calls from one event loop; each may raise ``BusError``.

    That there is no cache store (``NobodyThere``) is one of them: a caller that can do without catches it.
    """

    def __init__(self, bus: Bus, tensors: Tensors) -> None:
        self._bus = bus
        self._tensors = tensors

    async def put(self, keys: Sequence[str], blocks: torch.Tensor) -> int:
        """Keep ``blocks`` [n, ...] under as many keys; returns how many were new and are kept.

        Nobody may write to ``blocks`` before this returns.

        Raises:
            RemoteFailure: the cache store could not fetch them in time.
            TensorError: they cannot be exported, see ``Tensors.export``.
        """
        at_once = max(1, min(MAX_BATCH, PUT_BYTES * len(keys) // max(1, blocks.nbytes)))
        stored = 0
        for piece in _pieces(range(len(keys)), at_once):
            tensor = blocks[piece.start : piece.stop]
            deadline_s = CONTROL_DEADLINE_S + tensor.nbytes / BYTES_PER_S
            ref = self._tensors.export(tensor, uses=1, lease_s=2 * deadline_s)
            try:
                request = StoreTensors(keys=tuple(keys[piece.start : piece.stop]), tensor=ref)
                stored += (await self._bus.request(STORE_TENSORS, request, deadline_s=deadline_s)).stored
            finally:
                await self._tensors.release(ref)
        return stored

    async def have_many(self, keys: Sequence[str]) -> list[bool]:
        """For each key, whether something is kept under it now."""
        had: list[bool] = []
        for piece in _pieces(range(len(keys)), MAX_BATCH):
            request = HaveTensors(keys=tuple(keys[piece.start : piece.stop]))
            had += (await self._bus.request(HAVE_TENSORS, request, deadline_s=CONTROL_DEADLINE_S)).had
        return had

    async def get(self, keys: Sequence[str], most_bytes: int) -> list[torch.Tensor | None]:
        """For each key, what is kept under it, or None; together at most ``most_bytes`` a cache store.

        Those of one part share memory: a caller that keeps some of them for long copies them. All of one call are of
        one shape and dtype.

        Raises:
            RemoteFailure: they are not of one shape and dtype.
            TensorError: they were found and could not be fetched.
        """
        found: list[torch.Tensor | None] = [None] * len(keys)
        for piece in _pieces(range(len(keys)), MAX_BATCH):
            request = FindTensors(keys=tuple(keys[piece.start : piece.stop]), most_bytes=most_bytes)
            deadline_s = CONTROL_DEADLINE_S + most_bytes / BYTES_PER_S
            parts = (await self._bus.request(FIND_TENSORS, request, deadline_s=deadline_s)).parts
            for part in parts:
                tensor = await self._tensors.fetch(part.tensor, deadline_s=deadline_s)
                for place, one in zip(part.places, tensor, strict=True):
                    found[piece.start + place] = one
        return found

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget what is kept under the keys, in every cache store."""
        for piece in _pieces(range(len(keys)), MAX_BATCH):
            request = DropTensors(keys=tuple(keys[piece.start : piece.stop]))
            await self._bus.request(DROP_TENSORS, request, deadline_s=CONTROL_DEADLINE_S)


def _pieces(whole: range, most: int) -> Iterator[range]:
    for start in range(0, len(whole), most):
        yield whole[start : start + most]
