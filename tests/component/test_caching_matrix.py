"""Greedy answers are the same whatever is cached: in every design, to any depth, in any tier, after whatever happened.

In each cell the answer is transformers' own, and how much was found is as it must be, to the token.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common.language.settings import KVStore
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES, Medium, MemoryType
from common.mempool.caching import Caching
from common.mempool.pool import MemPool
from common.messages.chat import pack_tokens
from common.messages.mempool import SendPrefix
from common.messages.subjects import SEND_PREFIX
from tests.component.chat_support import DECODE, PREFILL
from tests.component.gateway_support import until
from tests.support.asking import Asker, asker
from tests.support.cache_store import cache_client, running_store
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES, greedy
from tests.support.nats_server import NatsServer
from tests.support.processes import Processes

PATIENCE_S = 120.0
ANSWER = 6
BLOCKS = 4
DEEP, PART = BLOCKS * BLOCK_TOKENS, 2 * BLOCK_TOKENS
SETTINGS: dict[str, Any] = {
    "kv_bytes": 24 * BLOCK_BYTES,
    "kv_dram_bytes": 12 * BLOCK_BYTES,
    "kv_disk_bytes": 24 * BLOCK_BYTES,
    "kv_store": KVStore.ALWAYS,
    "kv_store_tokens": 1,
    "transfer_s": PATIENCE_S,
    "chunk_tokens": 32,
}
_PRELOAD = ("common.language.serve", "transformers.models.llama.modeling_llama")
# Where what was kept is when it is asked for again.
TIERS = ("hbm", "dram", "disk", "store", "peer")


@cache
def prompt_of(folder: Path, seed: int, begins: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Whole blocks and one token; its answer is not near a tie and does not end early."""
    chance = random.Random(seed)
    while True:
        prompt = begins + tuple(chance.randrange(0, 256) for _ in range(DEEP + 1 - len(begins)))
        answer = greedy(folder, prompt, ANSWER)
        if answer.margin >= 1e-4 and len(answer.tokens) == ANSWER:
            return prompt


class Cells:
    """The cells of one design and tier: something is kept, brought there, and prompts go on from parts of it."""

    def __init__(self, asking: Asker, folder: Path, caching: Caching, seed: int, decode: str = "decode-0") -> None:
        self._asking = asking
        self._folder = folder
        self._caching = caching
        self._decode = decode
        self.kept = prompt_of(folder, seed)
        self.branch = prompt_of(folder, seed + 1, self.kept[:PART])
        self.hits = ((self.branch, PART), (self.kept, DEEP), (prompt_of(folder, seed + 2), 0))

    async def ask(self, prompt: tuple[int, ...], found: int, prefill: str) -> None:
        """``found``: how much is there by any caching."""
        told = await self._asking.ask(prompt, ANSWER, prefill, self._decode)
        assert told.tokens == greedy(self._folder, prompt, ANSWER).tokens
        assert told.cached == (found if self._caching.keeps_computed else 0)

    async def pull(self, tokens: Sequence[int], source: str, to: str) -> None:
        await self._asking.bus.request(
            SEND_PREFIX, SendPrefix(tokens=pack_tokens(tokens), to=to), source, deadline_s=PATIENCE_S
        )


def _move(memory: MemPool, tier: str, sequences: Sequence[bytes]) -> None:
    """Between two steps: have all that is kept leave what is warmer than ``tier``."""
    if tier != "hbm":
        memory.swap_out(memory.hbm.allocator.blocks)
    if tier == "disk":
        books = memory.tiers[Medium.DRAM].allocator
        taken = memory.alloc_mem(books.free_blocks + books.idle_blocks, MemoryType.DRAM_ONLY)
        assert taken is not None
        memory.free_mem(taken)
    if tier == "store":
        for tokens in sequences:
            for end in range(len(tokens) // KEY_BYTES, 0, -1):
                memory.delete(tokens[: end * KEY_BYTES])


async def _moved(watched: Watched, tier: str, prompts: Sequence[Sequence[int]]) -> None:
    await watched.settled()
    memory = watched.model.engine.memory
    sequences = [pack_tokens(prompt) for prompt in prompts]
    # Nothing runs, so this is between two steps.
    _move(memory, tier, sequences)
    expected = {"hbm": {Medium.HBM}, "dram": {Medium.DRAM}, "disk": {Medium.DISK}, "store": set[Medium]()}
    media = {address.medium for address in memory.match(sequences[0])}
    assert media in (expected[tier], set())


async def _counted(outcomes: Counter[str], count: int) -> None:
    """Return once so many sequences have been seen to."""

    async def done() -> bool:
        return outcomes.total() >= count

    await until(done, deadline_s=PATIENCE_S)


@pytest.mark.parametrize("caching", list(Caching))
async def test_answers_are_the_same_whatever_is_cached_wherever(
    nats_server: NatsServer, language_model: Path, caching: Caching
) -> None:
    url = nats_server.url
    own = SETTINGS | {"caching": caching}
    async with (
        cache_client(url) as client,
        running_store(client, url, None, memory_bytes=1 << 24),
        asker(url) as asking,
        language_instance(url, "prefill-0", language_model, PREFILL, **own) as first,
        language_instance(url, "prefill-1", language_model, PREFILL, **own) as peer,
        language_instance(url, "decode-0", language_model, DECODE, **own) as decode,
    ):
        instances = {"prefill-0": first, "prefill-1": peer}
        asked = Counter[str]()

        async def ask(cells: Cells, prompt: tuple[int, ...], found: int, prefill: str) -> None:
            await cells.ask(prompt, found, prefill)
            asked[prefill] += 1
            # What happens behind the answer has happened.
            if caching.keeps_computed:
                await _counted(instances[prefill].instance.stored.storing.outcomes, asked[prefill])
            if caching.sends_back:
                await _counted(decode.instance.sending_back.outcomes, asked.total())

        for number, tier in enumerate(TIERS):
            cells = Cells(asking, language_model, caching, 10 * number)
            await ask(cells, cells.kept, 0, "prefill-0")
            where, place = "prefill-0", tier
            if tier == "peer":
                await cells.pull(cells.kept, "prefill-0", "prefill-1")
                where, place = "prefill-1", "hbm"
            for prompt, found in cells.hits:
                for watched in (instances[where], decode):
                    await _moved(watched, place, (cells.kept, cells.branch))
                await ask(cells, prompt, found, where)
        for watched in (first, peer, decode):
            await watched.settled()
        looked = first.instance.stored.finding.outcomes
        # What was in the store alone; where something else was asked for, it had nothing of it.
        assert looked["found"] == (2 if caching.keeps_computed else 0)
        assert set(looked) <= {"found", "unknown"}


async def test_answers_are_the_same_after_a_crash(
    nats_server: NatsServer, language_model: Path, tmp_path: Path
) -> None:
    """Each design has a prefill instance, which is killed, and a decode instance, which is not."""
    url = nats_server.url
    designs = {caching: (f"prefill-{number}", f"decode-{number}") for number, caching in enumerate(Caching)}
    async with cache_client(url) as client, asker(url) as asking, contextlib.AsyncExitStack() as opened:
        await opened.enter_async_context(running_store(client, url, tmp_path, memory_bytes=1 << 24))
        processes = Processes(nats_server, client.bus, tmp_path, tmp_path, _PRELOAD)
        await opened.enter_async_context(processes.running())
        for caching, (_, decode) in designs.items():
            own = SETTINGS | {"caching": caching}
            await opened.enter_async_context(language_instance(url, decode, language_model, DECODE, **own))

        async def started() -> None:
            settings = {f"TRIPTYCH_{name.upper()}": str(value) for name, value in SETTINGS.items()}
            settings["TRIPTYCH_LANGUAGE_MODEL"] = str(language_model)
            for caching, (prefill, _) in designs.items():
                await processes.start(prefill, **settings, TRIPTYCH_CACHING=caching)
            await processes.ready(*(prefill for prefill, _ in designs.values()))

        async def stored() -> bool:
            blocks = sum(caching.keeps_computed for caching in Caching) * BLOCKS
            return len(await client.versions_at("cache_store-0")) == blocks

        await started()
        cells = {
            caching: Cells(asking, language_model, caching, 100 * number, decode)
            for number, (caching, (_, decode)) in enumerate(designs.items())
        }
        for caching, (prefill, _) in designs.items():
            await cells[caching].ask(cells[caching].kept, 0, prefill)
        await until(stored, deadline_s=PATIENCE_S)
        for prefill, _ in designs.values():
            await processes.kill(prefill)
        await started()
        for caching, (prefill, _) in designs.items():
            for prompt, found in cells[caching].hits:
                await cells[caching].ask(prompt, found, prefill)
