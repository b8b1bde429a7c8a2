"""Keys and values in the cache stores: the tier below all of an instance's own (MemServe, section 4).

Blocks of one version for ever, put and found in batches by keys that say what is in them. A cache store may forget
anything at any time, and being slow or away costs its clients the computing again, no more.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from common.bus.port import Bus
from common.mempool.address import KEY_BYTES
from common.messages.cache import MAX_BATCH, DropTensors, FindTensors, HaveTensors, StoreTensors
from common.messages.subjects import DROP_TENSORS, FIND_TENSORS, HAVE_TENSORS, STORE_TENSORS
from common.messages.tensors import TensorRef
from common.tensors.port import Tensors

CONTROL_DEADLINE_S = 1.0
# Beside that, at the rate of a slow disk.
BYTES_PER_S = 50e6


def prefix_keys(namespace: str, tokens: bytes) -> list[str]:
    """A key for each whole block of packed tokens, which says all tokens up to its end, as its keys and values do.

    Args:
        namespace: whatever else they depend on: the model, its weights, dtype and layout of blocks.
        tokens: packed (``common.messages.chat.pack_tokens``); what is left of a block at the end has no key.
    """
    hashed = hashlib.blake2b(digest_size=20)
    keys = []
    for start in range(0, len(tokens) - KEY_BYTES + 1, KEY_BYTES):
        hashed.update(tokens[start : start + KEY_BYTES])
        keys.append(f"{namespace}/{hashed.hexdigest()}")
    return keys


class StoreClient:
    """Puts, finds and drops blocks by key. All calls from one event loop; each may raise ``BusError``.

    That there is no cache store (``NobodyThere``) is one of them: a caller that can do without catches it.
    """

    def __init__(self, bus: Bus, tensors: Tensors) -> None:
        self._bus = bus
        self._tensors = tensors

    async def put(self, keys: Sequence[str], blocks: torch.Tensor, checksums: Sequence[int] = ()) -> int:
        """Keep ``blocks`` [n, ...] under as many keys, at most ``MAX_BATCH``; returns how many were new and are kept.

        Nobody may write to ``blocks`` before this returns.

        Args:
            checksums: the CRC-32 of each, for whoever finds it.

        Raises:
            RemoteFailure: the cache store could not fetch them in time.
            TensorError: they cannot be exported, see ``Tensors.export``.
        """
        deadline_s = CONTROL_DEADLINE_S + blocks.nbytes / BYTES_PER_S
        ref = self._tensors.export(blocks, uses=1, lease_s=2 * deadline_s)
        try:
            request = StoreTensors(keys=tuple(keys), tensor=ref, checksums=tuple(checksums))
            return (await self._bus.request(STORE_TENSORS, request, deadline_s=deadline_s)).stored
        finally:
            await self._tensors.release(ref)

    async def have_many(self, keys: Sequence[str]) -> list[bool]:
        """For each key, whether something is kept under it now."""
        had: list[bool] = []
        for piece in _pieces(keys):
            answer = await self._bus.request(HAVE_TENSORS, HaveTensors(keys=piece), deadline_s=CONTROL_DEADLINE_S)
            had += answer.had
        return had

    async def find(
        self, keys: Sequence[str], most_bytes: int, deadline_s: float
    ) -> list[tuple[TensorRef, tuple[int | None, ...]]]:
        """What is kept under the first of the keys, at most ``MAX_BATCH``, up to the first that is not found.

        Args:
            most_bytes: from one cache store.
            deadline_s: until then they must have been fetched; a cache store keeps them little longer.

        Returns:
            Blocks [n, ...] to be fetched once, or let go, and their checksums; each goes on from the key where the last
            one ended.
        """
        request = FindTensors(keys=tuple(keys), most_bytes=most_bytes, leading=True, wait_s=deadline_s)
        parts = (await self._bus.request(FIND_TENSORS, request, deadline_s=deadline_s)).parts
        found = []
        place = 0
        for part in sorted(parts, key=lambda part: part.places):
            count = len(part.places)
            if part.places == tuple(range(place, place + count)):
                found.append((part.tensor, part.checksums))
                place += count
            else:
                # Two cache stores that both had it.
                await self.let_go([part.tensor])
        return found

    async def let_go(self, found: Iterable[TensorRef]) -> None:
        """Of these, which ``find`` gave, nothing will be fetched any more."""
        for ref in found:
            await self._tensors.release(ref)

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget what is kept under the keys, in every cache store."""
        for piece in _pieces(keys):
            await self._bus.request(DROP_TENSORS, DropTensors(keys=piece), deadline_s=CONTROL_DEADLINE_S)


def _pieces(keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(keys), MAX_BATCH):
        yield tuple(keys[start : start + MAX_BATCH])
