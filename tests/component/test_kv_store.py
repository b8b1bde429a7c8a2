"""What language instances keep lies in the cache stores too: found again by whoever comes next, whoever has died since.

Real instances and cache stores; answers are transformers' own, and what was computed is counted to the token.
``TRIPTYCH_TEST_KILLS`` says how often cache stores die, ``TRIPTYCH_TEST_SEED`` repeats a draw.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from common.bus.errors import DeadlineExceeded, NobodyThere
from common.language.settings import KVStore
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.mempool.store_client import StoreClient, prefix_keys
from common.messages.cache import FindTensor, FindTensors, TensorsFound, TensorsPart
from common.messages.chat import pack_tokens
from common.messages.mempool import MatchPrefix
from common.messages.subjects import FIND_COPY, FIND_TENSORS, MATCH_PREFIX
from tests.component.gateway_support import until
from tests.component.language_support import gathered, language_stack, shown
from tests.support.asking import Asker, Told, asker
from tests.support.bus import eventually
from tests.support.cache_store import CacheClient, cache_client, running_store
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES, greedy
from tests.support.nats_server import NatsServer
from tests.support.processes import Processes

KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "3"))
SEED = int(os.environ["TRIPTYCH_TEST_SEED"])
PATIENCE_S = 60.0
ANSWER = 8
BLOCKS = 4
DEEP, PART = BLOCKS * BLOCK_TOKENS, 2 * BLOCK_TOKENS
LENGTH = DEEP + 5
FIRST, SECOND = "cache_store-0", "cache_store-1"
# Whatever it takes, however slow the machine, and of every length.
STORED: dict[str, Any] = {"kv_store": KVStore.ALWAYS, "kv_store_tokens": 1, "transfer_s": PATIENCE_S}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance here waits for cache stores, however slow this machine is just now: what is counted comes about."""
    monkeypatch.setattr("common.mempool.store_client.CONTROL_DEADLINE_S", PATIENCE_S)


@cache
def prompt_of(folder: Path, seed: int, begins: tuple[int, ...] = ()) -> tuple[int, ...]:
    """A prompt whose answer is not near a tie and does not end early."""
    chance = random.Random(seed)
    while True:
        prompt = begins + tuple(chance.randrange(0, 256) for _ in range(LENGTH - len(begins)))
        answer = greedy(folder, prompt, ANSWER)
        if answer.margin >= 1e-4 and len(answer.tokens) == ANSWER:
            return prompt


async def answered(asking: Asker, folder: Path, prompt: tuple[int, ...]) -> int:
    """Have ``decode-0`` answer, and see whether that is right; of how many tokens keys and values were there."""
    told: Told = await asking.ask(prompt, ANSWER, "decode-0")
    assert told.tokens == greedy(folder, prompt, ANSWER).tokens
    return told.cached


def forget(watched: Watched, prompt: tuple[int, ...]) -> None:
    """Have nothing of a prompt any more in an instance that does nothing just now."""
    memory, tokens = watched.model.engine.memory, pack_tokens(prompt)
    for end in range(len(tokens) // KEY_BYTES, 0, -1):
        memory.delete(tokens[: end * KEY_BYTES])
    assert not memory.match(tokens)


def keys_of(watched: Watched, prompt: tuple[int, ...]) -> list[str]:
    """Of a prompt's whole blocks in the cache stores."""
    return prefix_keys(watched.model.namespace, pack_tokens(prompt))


async def counted(outcomes: Counter[str], outcome: str, count: int) -> None:
    """Return once there were so many."""

    async def done() -> bool:
        return outcomes[outcome] >= count

    await until(done, deadline_s=PATIENCE_S)


async def gone(client: CacheClient, instance: str) -> None:
    """Return once nobody answers for a cache store that was killed."""

    async def done() -> bool:
        with contextlib.suppress(DeadlineExceeded):
            try:
                await client.bus.request(FIND_COPY, FindTensor(key="nothing", uses=0), instance, deadline_s=1.0)
            except NobodyThere:
                return True
        return False

    await until(done, deadline_s=PATIENCE_S)


async def test_a_client_is_told_what_a_new_instance_found(nats_server: NatsServer, language_model: Path) -> None:
    url = nats_server.url
    prompt = prompt_of(language_model, 1)
    async with (
        cache_client(url) as client,
        running_store(client, url, None),
        language_stack(url, language_model) as stack,
    ):
        for number, cached in enumerate((0, DEEP)):
            name = f"decode-{number}"
            async with language_instance(url, name, language_model, **STORED) as watched:
                await stack.served(name)
                told = await stack.client.completions.create(
                    model=stack.model, prompt=list(prompt), max_tokens=ANSWER, temperature=0
                )
                assert told.choices[0].text == shown(greedy(language_model, prompt, ANSWER).tokens)
                assert told.usage is not None and told.usage.prompt_tokens_details is not None
                assert (told.usage.prompt_tokens_details.cached_tokens or 0) == cached
                assert watched.model.engine.counts.prefilled == len(prompt) - cached
                storing = watched.instance.stored.storing
                await counted(storing.outcomes, "known" if cached else "stored", 1)
                assert storing.stored_blocks == (0 if cached else BLOCKS)
            await stack.lost(name)


async def test_what_every_tier_has_let_go_is_found_in_the_store(nats_server: NatsServer, language_model: Path) -> None:
    url = nats_server.url
    small = {"kv_bytes": 20 * BLOCK_BYTES, "kv_dram_bytes": 4 * BLOCK_BYTES, "kv_disk_bytes": 6 * BLOCK_BYTES}
    prompt = prompt_of(language_model, 1)
    branch = prompt_of(language_model, 2, prompt[:PART])
    async with (
        cache_client(url) as client,
        running_store(client, url, None, memory_bytes=1 << 24),
        asker(url) as asking,
        language_instance(url, "decode-0", language_model, **STORED, **small) as watched,
    ):
        counts, memory = watched.model.engine.counts, watched.model.engine.memory
        finding, storing = watched.instance.stored.finding, watched.instance.stored.storing
        assert await answered(asking, language_model, prompt) == 0
        others = 0
        await counted(storing.outcomes, "stored", 1)
        while memory.match(pack_tokens(prompt)):
            others += 1
            assert await answered(asking, language_model, prompt_of(language_model, 100 + others)) == 0
            # What is evicted before its turn is not stored.
            await counted(storing.outcomes, "stored", 1 + others)
        assert others > 5 and finding.outcomes == {"unknown": 1 + others}
        assert await answered(asking, language_model, prompt) == DEEP
        assert finding.outcomes["found"] == 1
        # All at once look for the same, one asks, and each computes what is its own.
        await watched.settled()
        forget(watched, prompt)
        before = counts.prefilled
        asked = [prompt, prompt, branch, prompt]
        cached = await gathered(*(answered(asking, language_model, one) for one in asked))
        assert cached == [DEEP, DEEP, PART, DEEP]
        assert counts.prefilled - before == sum(len(one) - known for one, known in zip(asked, cached, strict=True))
        assert finding.outcomes["found"] == 2 and finding.found_tokens == 2 * DEEP
        await watched.settled()


async def test_stores_die_come_back_and_are_not_trusted(
    nats_server: NatsServer, language_model: Path, tmp_path: Path
) -> None:
    url = nats_server.url
    prompt, other = prompt_of(language_model, 1), prompt_of(language_model, 2)
    async with (
        cache_client(url) as client,
        asker(url) as asking,
        language_instance(url, "decode-0", language_model, **STORED) as watched,
    ):
        processes = Processes(nats_server, client.bus, tmp_path, tmp_path, ["services.cache_store.service"])
        finding, storing = watched.instance.stored.finding, watched.instance.stored.storing
        keys = keys_of(watched, prompt)

        async def started(*instances: str) -> None:
            for instance in instances:
                await processes.start(instance)
            await processes.ready(*instances)
            for instance in instances:
                await client.answered(instance)

        async def killed(*instances: str) -> None:
            for instance in instances:
                await processes.kill(instance)
                await gone(client, instance)

        async def again(found: int) -> None:
            """Have it answered by an instance that has nothing of it."""
            await watched.settled()
            forget(watched, prompt)
            assert await answered(asking, language_model, prompt) == found

        async with processes.running():
            assert await answered(asking, language_model, prompt) == 0
            await counted(storing.outcomes, "failed", 1)
            assert finding.outcomes == {"nobody": 1}
            await started(FIRST, SECOND)
            await again(0)
            await counted(storing.outcomes, "stored", 1)
            assert set(await client.agreed(FIRST, SECOND)) == set(keys)
            # On disk too, of which the catalogue says nothing.
            await eventually(lambda: len(list((tmp_path / "cache" / FIRST).glob("*.tensor"))) == BLOCKS, PATIENCE_S)
            await killed(FIRST)
            await again(DEEP)
            await killed(SECOND)
            await again(0)
            await counted(storing.outcomes, "failed", 2)
            # What lies on its disk is there again.
            await started(FIRST)
            await again(DEEP)
            # Damaged there: what comes before it is of use, and the rest is computed, and stored anew.
            await killed(FIRST)
            file = tmp_path / "cache" / FIRST / f"{hashlib.sha256(keys[2].encode()).hexdigest()[:40]}.tensor"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
            await started(FIRST)
            await again(PART)
            await counted(storing.outcomes, "stored", 2)
            await again(DEEP)
            # And what is not what was stored, by the checksum that was stored with it.
            shape = watched.model.engine.memory.hbm.memory.shape[1:]
            blocks_at = StoreClient(client.bus, client.tensors)
            wrong = keys_of(watched, other)
            await blocks_at.put(wrong, torch.ones(BLOCKS, *shape), [1] * BLOCKS)
            assert await answered(asking, language_model, other) == 0
            assert finding.outcomes["damaged"] == 1
            await counted(storing.outcomes, "stored", 3)
            await watched.settled()
            forget(watched, other)
            assert await answered(asking, language_model, other) == DEEP
            await watched.settled()


async def test_what_cannot_be_used_is_let_go_and_asked_for_once(nats_server: NatsServer, language_model: Path) -> None:
    """Many lack the same, and what a cache store gives for it does not fit here: the first of them computes it."""
    url, prompts = nats_server.url, 4
    prompt = prompt_of(language_model, 1)
    async with (
        cache_client(url) as client,
        asker(url) as asking,
        language_instance(url, "decode-0", language_model, **STORED) as watched,
    ):

        async def find(asked: FindTensors) -> TensorsFound:
            await eventually(lambda: watched.instance.sequences == prompts, PATIENCE_S)
            # An answer that comes between two steps, after the last one has begun to look.
            await client.bus.request(MATCH_PREFIX, MatchPrefix(tokens=b""), "decode-0", deadline_s=PATIENCE_S)
            ref = client.tensors.export(torch.ones(len(asked.keys), 3))
            part = TensorsPart(places=tuple(range(len(asked.keys))), tensor=ref, checksums=(None,) * len(asked.keys))
            return TensorsFound(parts=(part,))

        subscription = await client.bus.serve(FIND_TENSORS, find)
        cached = await gathered(*(answered(asking, language_model, prompt) for _ in range(prompts)))
        assert sorted(cached) == [0, DEEP, DEEP, DEEP]
        assert watched.instance.stored.finding.outcomes == {"not_wanted": 1}

        await eventually(lambda: client.tensors.exported_count == 0)
        await watched.settled()
        await subscription.stop()


async def test_what_has_come_from_elsewhere_meanwhile_is_let_go(nats_server: NatsServer, language_model: Path) -> None:
    url, prompt = nats_server.url, prompt_of(language_model, 1)
    tokens = pack_tokens(prompt)[: BLOCKS * KEY_BYTES]
    async with (
        cache_client(url) as client,
        asker(url) as asking,
        language_instance(url, "decode-0", language_model, **STORED) as watched,
    ):
        assert await answered(asking, language_model, prompt) == 0
        await watched.settled()
        memory = watched.model.engine.memory
        blocks = memory.hbm.memory[[address.block for address in memory.match(tokens)]].clone()
        forget(watched, prompt)

        async def find(asked: FindTensors) -> TensorsFound:
            again = memory.alloc_mem(BLOCKS) or []
            memory.hbm.memory[[address.block for address in again]] = blocks
            memory.insert(tokens, again)
            part = TensorsPart(places=tuple(range(BLOCKS)), tensor=client.tensors.export(blocks))
            return TensorsFound(parts=(part,))

        subscription = await client.bus.serve(FIND_TENSORS, find)
        assert await answered(asking, language_model, prompt) == DEEP
        assert watched.instance.stored.finding.found_tokens == 0

        await eventually(lambda: client.tensors.exported_count == 0)
        await watched.settled()
        await subscription.stop()


async def test_answers_go_on_whatever_happens_to_stores(
    nats_server: NatsServer, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are killed, or stopped for a while, at random moments, while an instance with hardly any memory asks."""
    monkeypatch.setattr("common.mempool.store_client.CONTROL_DEADLINE_S", 1.0)
    url = nats_server.url
    chance = random.Random(SEED)
    prompts = [prompt_of(language_model, number) for number in range(8)]
    own = STORED | {"kv_bytes": 16 * BLOCK_BYTES, "transfer_s": 0.5}
    async with (
        cache_client(url) as client,
        asker(url) as asking,
        language_instance(url, "decode-0", language_model, **own) as watched,
    ):
        processes = Processes(nats_server, client.bus, tmp_path, tmp_path, ["services.cache_store.service"])
        finding = watched.instance.stored.finding
        ended = asyncio.Event()

        async def asks() -> None:
            while not ended.is_set():
                await answered(asking, language_model, chance.choice(prompts))

        async def kills() -> None:
            for instance in (FIRST, SECOND):
                await processes.start(instance)
            await processes.ready(FIRST, SECOND)
            await counted(finding.outcomes, "found", 1)
            for number in range(KILLS):
                victim = (FIRST, SECOND)[number % 2]
                await asyncio.sleep(chance.random() * 0.2)
                if chance.random() < 0.3:
                    processes.signal(victim, signal.SIGSTOP)
                    await asyncio.sleep(chance.random())
                    processes.signal(victim, signal.SIGCONT)
                else:
                    await processes.kill(victim)
                    await processes.start(victim)
                    await processes.ready(victim)
            await counted(finding.outcomes, "found", finding.outcomes["found"] + 1)
            ended.set()

        async with processes.running(), asyncio.TaskGroup() as tasks:
            tasks.create_task(kills())
            for _ in range(3):
                tasks.create_task(asks())
        await watched.settled()
