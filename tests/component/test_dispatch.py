"""Prefill instances that choose who decodes, by every rule: answers are as by one instance."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from common.bus.nats_bus import NatsBus
from common.language.settings import TransferMode
from common.messages.cluster import LanguageRole
from common.messages.dispatch import DecodeLoad, DecodeLoads
from common.messages.failures import Failure, Stage
from common.messages.subjects import DECODE_LOADS, LOAD_REPORTED
from common.policies.language.decode_dispatch import DispatchRule
from tests.component.chat_support import DECODE, PREFILL, always
from tests.component.gateway_support import until
from tests.component.language_support import LanguageStack, gathered, known_prompts, language_stack, shown
from tests.support.language import WAIT_S, played_language_worker
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer

FOUR = {"prefill-0": PREFILL, "prefill-1": PREFILL, "decode-0": DECODE, "decode-1": DECODE}
TWO = {"prefill-0": PREFILL, "decode-0": DECODE}


@dataclass(frozen=True)
class Cluster:
    """``bus`` is a listener's, ``loads`` every broadcast that it heard, in order."""

    stack: LanguageStack
    instances: dict[str, Watched]
    bus: NatsBus
    loads: asyncio.Queue[DecodeLoads]

    @property
    def choices(self) -> Counter[str]:
        """By whom sequences were given to, over all prefill instances."""
        return sum((watched.instance.dispatching.choices for watched in self.instances.values()), Counter[str]())

    @property
    def taken(self) -> Counter[str]:
        """Likewise, by who took them."""
        return Counter({name: watched.instance.receiving.outcomes["taken"] for name, watched in self.instances.items()})

    async def told(self, *decoding: str) -> DecodeLoads:
        """The next broadcast that is about these, and no others."""
        async with asyncio.timeout(WAIT_S):
            while True:
                told = await self.loads.get()
                if {load.instance for load in told.loads} == set(decoding):
                    return told

    async def settled(self) -> None:
        """Return once nobody has anything any more."""
        for watched in self.instances.values():
            await watched.settled()
            assert not len(watched.instance.dispatching)


@contextlib.asynccontextmanager
async def cluster(
    url: str,
    folder: Path,
    rules: Mapping[str, DispatchRule] | None = None,
    roles: Mapping[str, tuple[LanguageRole, ...]] = FOUR,
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """``rules`` by instance; power of two, without. It is there once it was told who decodes."""
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(await NatsBus.connect(url, name="listener"))
        loads: asyncio.Queue[DecodeLoads] = asyncio.Queue(10_000)
        await bus.subscribe(DECODE_LOADS, loads.put_nowait)
        stack = await opened.enter_async_context(language_stack(url, folder, DispatchRule.POWER_OF_TWO))
        instances = {}
        for name, own in roles.items():
            rule = (rules or {}).get(name, DispatchRule.POWER_OF_TWO)
            opening = language_instance(url, name, folder, own, dispatch=rule, **({"chunk_tokens": 32} | settings))
            instances[name] = await opened.enter_async_context(opening)
        running = Cluster(stack, instances, bus, loads)
        await stack.served(*roles)
        await running.told(*(name for name, own in roles.items() if own == DECODE))
        yield running


async def test_answers_are_as_by_one_instance(nats_server: NatsServer, language_model: Path) -> None:
    prompts = known_prompts(language_model)
    expected = [shown(answer) for answer in prompts.values()]
    for first, second, mode, rounds in (
        (DispatchRule.POWER_OF_TWO, DispatchRule.LEAST_DELAY, TransferMode.BY_CHUNK, 2),
        (DispatchRule.RANDOM, DispatchRule.IMBALANCE, TransferMode.BY_LAYER, 1),
    ):
        rules = {"prefill-0": first, "prefill-1": second}
        async with cluster(nats_server.url, language_model, rules, transfer_mode=mode) as running:
            for _ in range(rounds):
                assert await gathered(*(running.stack.text(prompt) for prompt in prompts)) == expected
            await running.settled()
            # More, where an instance was so slow that it counted as lost.
            assert sum(running.choices.values()) >= rounds * len(prompts)
            assert sum(running.taken.values()) > 0


async def test_with_little_memory_answers_are_the_same(nats_server: NatsServer, language_model: Path) -> None:
    prompts = known_prompts(language_model)
    async with cluster(nats_server.url, language_model, kv_bytes=12 * BLOCK_BYTES, transfer_s=1.0) as running:
        asked = [*prompts, *prompts]
        answers = await gathered(*(running.stack.text(prompt) for prompt in asked))
        assert answers == [shown(prompts[prompt]) for prompt in asked]
        await running.settled()


async def test_the_broadcast_says_what_is_decoded_and_leaves_out_who_leaves(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    prompt = list(prompts)[-1]
    async with cluster(nats_server.url, language_model) as running:
        idle = await running.told("decode-0", "decode-1")
        blocks = {load.instance: load.free_blocks for load in idle.loads}
        assert all(blocks[name] == running.instances[name].books.blocks for name in blocks)
        streams: list[asyncio.Task[str]] = []
        busy: list[DecodeLoad] = []
        while not busy:
            if not streams or streams[-1].done():
                answer = running.stack.text(prompt, 350, extra_body={"ignore_eos": True})
                streams.append(asyncio.create_task(answer))
            busy = [load for load in (await running.told("decode-0", "decode-1")).loads if load.light]
        assert busy[0].free_blocks < blocks[busy[0].instance]
        other = next(name for name in ("decode-0", "decode-1") if name != busy[0].instance)
        running.instances[other].stop.set()
        await running.told(busy[0].instance)
        assert await streams[-1]
        before = running.choices
        assert await running.stack.text(prompt) == shown(prompts[prompt])
        assert set(running.choices - before) == {busy[0].instance}


async def test_where_one_does_not_take_it_another_is_chosen_at_once(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    url = nats_server.url
    async with (
        cluster(url, language_model, roles=TWO) as running,
        played_language_worker(url, "decode-9", always, DECODE) as played,
    ):
        played.faults.refuse = Failure(stage=Stage.DECODE, code="overloaded", message="full", retryable=True)

        async def boast() -> None:
            while True:
                load = DecodeLoad(instance="decode-9", free_blocks=100_000, heavy=0, light=0)
                await running.bus.publish(LOAD_REPORTED, load)
                await asyncio.sleep(0.1)

        boasting = asyncio.create_task(boast())
        answered = 0
        while not running.choices["decode-9"]:
            await running.told("decode-0", "decode-9")
            answers = await gathered(*(running.stack.text(prompt) for prompt in prompts))
            assert answers == [shown(expected) for expected in prompts.values()]
            answered += len(answers)
        boasting.cancel()
        await running.settled()
        assert running.taken["decode-0"] == running.choices["decode-0"] == answered
        async with aiohttp.ClientSession(running.stack.gateway.url) as http, http.get("/metrics") as response:
            assert "triptych_sequence_reroutes_total{" not in await response.text()


async def test_cancelled_before_or_after_the_choice_nothing_is_left(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = list(known_prompts(language_model))
    async with cluster(nats_server.url, language_model, roles=TWO) as running:
        for number in range(24):
            asking = asyncio.create_task(running.stack.text(prompts[number % len(prompts)], 300))
            await asyncio.wait((asking,), timeout=0.005 * (number % 12))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def idle() -> bool:
            return not any(watched.model.engine.busy for watched in running.instances.values())

        await until(idle)
        await running.settled()
