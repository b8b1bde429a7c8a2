"""Keys and values of a prompt's first tokens from the cache stores, before it is computed."""

import asyncio
from collections import Counter
from functools import partial

import structlog

from common.bus.errors import BusError, NobodyThere, Refusal
from common.language.stepper import Stepper
from common.language.worth import Worth
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.mempool.pool import MemPool
from common.mempool.store_client import StoreClient, prefix_keys
from common.mempool.transfer import DAMAGED, NOT_MOVED, BlockTransfer
from common.messages.cache import MAX_BATCH
from common.messages.chat import tokens_in
from common.messages.mempool import MoveBlocks
from common.tensors.errors import TensorError

log = structlog.get_logger()

# Of one answer: so much more memory does a cache store take for each that it gives.
_AT_ONCE_BYTES = 64 << 20
_SOURCE = "cache_store"
_SHORTEST_S = 0.01


class FindingPrefixes:
    """``outcomes`` counts how it went, ``found_tokens`` what was brought.

    Args:
        checks: whether checksums are compared.
    """

    def __init__(
        self,
        client: StoreClient,
        memory: MemPool,
        transfers: BlockTransfer,
        stepper: Stepper,
        worth: Worth,
        namespace: str,
        checks: bool,
    ) -> None:
        self._client = client
        self._memory = memory
        self._transfers = transfers
        self._stepper = stepper
        self._worth = worth
        self._namespace = namespace
        self._checks = checks
        block = memory.hbm.memory[0]
        self._at_once = max(1, min(MAX_BATCH, _AT_ONCE_BYTES // block.nbytes))
        # By the key of the first block that is looked for: set when that has come to its end.
        self._under_way: dict[str, asyncio.Event] = {}
        self.outcomes: Counter[str] = Counter()
        self.found_tokens = 0

    def lacking(self, tokens: bytes) -> int:
        """Between two steps: of how many tokens the memory lacks what is worth looking for; 0: of none."""
        useful = _useful(tokens)
        now_s = asyncio.get_running_loop().time()
        # By far the most are too short, which is seen without a look at the memory.
        if not self._worth.pays(tokens_in(useful), now_s):
            return 0
        lacking = tokens_in(useful) - len(self._memory.match(useful)) * BLOCK_TOKENS
        return lacking if self._worth.pays(lacking, now_s) else 0

    async def bring(self, tokens: bytes, lacking: int) -> None:
        """Have in the memory what the cache stores have of a prompt and it lacks, as far as that comes in time."""
        useful = _useful(tokens)
        keys = prefix_keys(self._namespace, useful)
        first = keys[len(keys) - lacking // BLOCK_TOKENS]
        while (other := self._under_way.get(first)) is not None:
            # Whoever looks for the same has a deadline.
            await other.wait()
            lacking = await self._stepper.between(partial(self.lacking, tokens))
            if not lacking:
                return
            awaited, first = first, keys[len(keys) - lacking // BLOCK_TOKENS]
            if first == awaited:
                # It has just not come, and is computed: nobody is to wait for it once more, all who lack it in turn.
                return
        self._under_way[first] = asyncio.Event()
        try:
            outcome = await self._bring(useful, keys, lacking)
        finally:
            self._under_way.pop(first).set()
        self.outcomes[outcome] += 1

    async def _bring(self, tokens: bytes, keys: list[str], lacking: int) -> str:
        """What came of it; see ``outcomes``."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        end_s = began_s + self._worth.patience_s(lacking)
        place = known = len(keys) - lacking // BLOCK_TOKENS
        try:
            while place < len(keys):
                asked = keys[place : place + self._at_once]
                found = await self._some(tokens, place, asked, end_s)
                place += found
                if found < len(asked):
                    break
        except NobodyThere:
            self._worth.failed(clock())
            return "nobody"
        except Refusal as refusal:
            log.info("prefix not taken from a cache store", reason=str(refusal))
            if refusal.failure.code == DAMAGED:
                await self._forget(keys[place : place + self._at_once])
            elif refusal.failure.code == NOT_MOVED:
                self._worth.failed(clock())
            return refusal.failure.code
        except (BusError, TensorError) as error:
            log.info("prefix not fetched from a cache store", reason=str(error))
            self._worth.failed(clock())
            return "failed"
        if place == known:
            return "unknown"
        tokens_found = (place - known) * BLOCK_TOKENS
        self.found_tokens += tokens_found
        self._worth.fetched(tokens_found, clock() - began_s)
        return "found"

    async def _some(self, tokens: bytes, place: int, keys: list[str], end_s: float) -> int:
        """Look for blocks from ``place`` on, and put into the memory what is found; how many it are."""
        clock = asyncio.get_running_loop().time
        first = place
        found = await self._client.find(keys, _AT_ONCE_BYTES, max(_SHORTEST_S, end_s - clock()))
        try:
            while found:
                ref, checksums = found[0]
                blocks = MoveBlocks(
                    source=_SOURCE,
                    block_tokens=BLOCK_TOKENS,
                    kv=(ref,),
                    checksums=checksums if self._checks else (),
                    tokens=tokens[: (place + ref.shape[0]) * KEY_BYTES],
                    first_block=place,
                )
                moved = await self._transfers.receive_within(blocks, max(_SHORTEST_S, end_s - clock()))
                if not moved.addresses:
                    # It was here by now, and not fetched. Whoever brought it or computed it is likely to go on.
                    break
                place += ref.shape[0]
                del found[0]
        finally:
            # A cache store keeps what it gives until it is fetched, and has room for so much of that.
            await self._client.let_go([ref for ref, _ in found])
        return place - first

    async def _forget(self, keys: list[str]) -> None:
        """They were damaged where they lie: whoever computes them stores them anew."""
        try:
            await self._client.delete(keys)
        except BusError as error:
            log.info("damaged blocks not dropped", reason=str(error))


def _useful(tokens: bytes) -> bytes:
    """The whole blocks before the last token, which is computed in any case."""
    return tokens[: (tokens_in(tokens) - 1) // BLOCK_TOKENS * KEY_BYTES]
