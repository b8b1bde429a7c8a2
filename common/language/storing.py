"""What an instance keeps goes to the cache stores too: behind the answer, before it is evicted here.

So eviction has nothing to copy while a step waits for memory, what an instance had outlives its crash, and what is in
use all the time and so never evicted, such as a system prompt, is there for an instance that starts. One sequence at a
time; while it waits it holds nothing, so what was evicted before its turn is not stored.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial

import structlog
import torch
from torch import Tensor

from common.bus.errors import BusError
from common.language.stepper import Stepper
from common.language.worth import Worth
from common.mempool.address import KEY_BYTES, Address, Medium
from common.mempool.allocator import Access
from common.mempool.checksum import checksums
from common.mempool.pool import MemPool
from common.mempool.store_client import StoreClient, prefix_keys
from common.mempool.tiers import begin_access, end_access, memory_of
from common.messages.cache import MAX_BATCH
from common.messages.chat import tokens_in
from common.tensors.errors import TensorError

log = structlog.get_logger()

# Of so many sequences the newest.
_MOST_WAITING = 64
# Copied at once. They cannot be evicted meanwhile, so it is a small part of the pool as well.
_AT_ONCE_BYTES = 8 << 20
_PART_OF_POOL = 8
# While something is computed, there is a rest of so many times what each such part took.
_REST = 4.0


class StoringPrefixes:
    """``outcomes`` counts what became of the sequences, ``stored_blocks`` what was new in the cache stores."""

    def __init__(self, client: StoreClient, memory: MemPool, stepper: Stepper, worth: Worth, namespace: str) -> None:
        self._client = client
        self._memory = memory
        self._stepper = stepper
        self._worth = worth
        self._namespace = namespace
        blocks = memory.hbm.memory
        self._at_once = max(1, min(MAX_BATCH, _AT_ONCE_BYTES // blocks[0].nbytes, len(blocks) // _PART_OF_POOL))
        self._waiting: OrderedDict[str, bytes] = OrderedDict()
        self._news = asyncio.Event()
        self.outcomes: Counter[str] = Counter()
        self.stored_blocks = 0

    def later(self, sequence: str, tokens: bytes) -> None:
        """These first tokens of a sequence have been kept here. What it had before is part of them."""
        if not self._worth.pays(tokens_in(tokens), asyncio.get_running_loop().time()):
            return
        self._waiting.pop(sequence, None)
        self._waiting[sequence] = tokens
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popitem(last=False)
            self.outcomes["left_out"] += 1
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                _, tokens = self._waiting.popitem(last=False)
                try:
                    new = await self._store(tokens)
                    self.stored_blocks += new
                    self.outcomes["stored" if new else "known"] += 1
                except (BusError, TensorError) as error:
                    log.info("prefix not stored", reason=str(error))
                    self._worth.failed(asyncio.get_running_loop().time())
                    self.outcomes["failed"] += 1

    async def _store(self, tokens: bytes) -> int:
        """Returns how many blocks were new there. The end goes first, as it is evicted first."""
        keys = prefix_keys(self._namespace, tokens)
        had = await self._client.have_many(keys)
        new = 0
        for piece in lacking(had, self._at_once):
            began_s = asyncio.get_running_loop().time()
            blocks, values = await self._copied(tokens, piece)
            if len(blocks):
                new += await self._client.put(keys[piece.start : piece.start + len(blocks)], blocks, values)
            if self._stepper.busy:
                await asyncio.sleep(_REST * (asyncio.get_running_loop().time() - began_s))
        return new

    async def _copied(self, tokens: bytes, piece: range) -> tuple[Tensor, list[int]]:
        """What is here of some blocks, in the host's memory, and the checksum of each."""
        addresses, accesses = await self._stepper.between(partial(self._open, tokens, piece))
        try:
            return await asyncio.to_thread(_copy, self._memory, addresses)
        finally:
            self._stepper.soon(partial(end_access, self._memory.tiers, accesses))

    def _open(self, tokens: bytes, piece: range) -> tuple[list[Address], list[tuple[Medium, Access]]]:
        # Not held: being stored is no use, and evicts nothing else.
        addresses = self._memory.match(tokens[: piece.stop * KEY_BYTES])[piece.start :]
        return addresses, begin_access(self._memory.tiers, addresses)


def lacking(had: Sequence[bool], most: int) -> Iterator[range]:
    """Runs of at most so many places that are not had, the last first."""
    stop = len(had)
    while stop:
        start = stop
        while start and not had[start - 1] and stop - start < most:
            start -= 1
        if start < stop:
            yield range(start, stop)
        stop = start if start < stop else stop - 1


def _copy(memory: MemPool, addresses: Sequence[Address]) -> tuple[Tensor, list[int]]:
    like = memory.hbm.memory
    blocks = torch.empty((len(addresses), *like.shape[1:]), dtype=like.dtype)
    place = 0
    for run in memory_of(memory.tiers, addresses):
        blocks[place : place + len(run)].copy_(run)
        place += len(run)
    return blocks, checksums([blocks])
