"""Embeddings in the cache stores, with real encoders: found by the next life or another one, bit for bit the same."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from common.bus.nats_bus import NatsBus
from common.messages.subjects import ENCODE_PROMPT, MEMBERS, PROMPTS_SERVED
from common.messages.video import EncodePrompt, PromptSource, PromptsServed
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec
from common.tensors.ucx import UcxTensors
from services.encoder.shared import SharedPrompts
from tests.support.cache_store import CacheClient
from tests.support.nats_server import NatsServer
from tests.support.processes import WAIT_S, Processes
from tests.support.small_model import save_small_model

PROMPTS = ("a red circle moves left", "a red circle", "Ünï côdé ☃", "a b c d e f")
STORE = "cache_store-0"
# Encoders do not wait long for a cache store, which a busy machine may make slow.
TRIES, STORED_WITHIN_S = 5, 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


class Encoders:
    """Real encoders and what they say of where embeddings came from."""

    def __init__(self, processes: Processes, bus: NatsBus, tensors: UcxTensors) -> None:
        self.processes = processes
        self._bus = bus
        self._tensors = tensors
        self._served: Counter[PromptSource] = Counter()

    def heard(self, served: PromptsServed) -> None:
        self._served[served.source] += served.prompts

    async def start(self, *instances: str, share: str = "always") -> None:
        for instance in instances:
            await self.processes.start(instance, TRIPTYCH_SHARE_PROMPTS=share)
        await self.processes.ready(*instances)

    async def encoded(self, instance: str) -> list[torch.Tensor]:
        """What it answers for each prompt."""
        embeddings = []
        for prompt in PROMPTS:
            request = EncodePrompt(job_id="job", prompt=prompt)
            answer = await self._bus.request(ENCODE_PROMPT, request, instance, deadline_s=WAIT_S)
            embeddings.append(await self._tensors.fetch(answer.text, deadline_s=WAIT_S))
        return embeddings

    async def made(self, instance: str, expected: list[torch.Tensor]) -> dict[PromptSource, int]:
        """Have it answer, see whether that is right, and where it came from."""
        assert all(map(torch.equal, await self.encoded(instance), expected))
        return await self.served()

    async def stored(self, instance: str) -> None:
        """Return once the cache store has what this encoder made."""
        asker = CacheClient(self._bus, self._tensors)
        for _ in range(TRIES):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STORED_WITHIN_S):
                    while len(await asker.versions_at(STORE)) < len(PROMPTS):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    return
            # The cache store was too slow for one of them, which is not offered again.
            await self.next_life(instance)
            await self.encoded(instance)
            await self.served()
        raise AssertionError("not all was stored")

    async def found(self, instance: str, expected: list[torch.Tensor]) -> None:
        """Have it answer with what lies in the cache store. One that is too slow just now is not waited for."""
        for _ in range(TRIES):
            served = await self.made(instance, expected)
            if served == {PromptSource.CACHE_STORE: len(PROMPTS)}:
                return
            assert set(served) <= {PromptSource.CACHE_STORE, PromptSource.MODEL}
            await self.next_life(instance)
        raise AssertionError(f"{instance} did not find all in the cache store")

    async def next_life(self, instance: str) -> None:
        await self.processes.kill(instance)
        await self.start(instance)

    async def served(self) -> dict[PromptSource, int]:
        """How many since the last call, once as many were told of as were asked for."""
        async with asyncio.timeout(WAIT_S):
            while self._served.total() < len(PROMPTS):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        served, self._served = dict(self._served), Counter()
        return served


@contextlib.asynccontextmanager
async def encoders(server: NatsServer, model: Path, folder: Path) -> AsyncIterator[Encoders]:
    async with (
        await NatsBus.connect(server.url, name="asker") as bus,
        await UcxTensors.open(owner="asker") as tensors,
    ):
        await bus.prepare(buckets=(MEMBERS,))
        processes = Processes(server, bus, model, folder)
        played = Encoders(processes, bus, tensors)
        await bus.subscribe(PROMPTS_SERVED, played.heard)
        async with processes.running():
            yield played


async def test_embeddings_are_found_by_the_next_life_and_by_another_encoder(
    nats_server: NatsServer, model: Path, tmp_path: Path
) -> None:
    pipeline = OpenSoraPipeline(load_spec(model))
    expected = [pipeline.encoder.encode([prompt])[0] for prompt in PROMPTS]
    async with encoders(nats_server, model, tmp_path) as played:
        await played.processes.start(STORE)
        await played.start("encoder-0")
        await played.processes.ready(STORE)
        for source in (PromptSource.MODEL, PromptSource.MEMORY):
            assert await played.made("encoder-0", expected) == {source: len(PROMPTS)}
        await played.stored("encoder-0")
        await played.processes.kill("encoder-0")
        await played.start("encoder-0", "encoder-1")
        for instance in ("encoder-0", "encoder-1"):
            await played.found(instance, expected)
        # Without a cache store they are made again.
        await played.processes.kill(STORE)
        await played.next_life("encoder-1")
        assert await played.made("encoder-1", expected) == {PromptSource.MODEL: len(PROMPTS)}


async def test_another_model_s_embeddings_are_not_taken(nats_server: NatsServer, tmp_path: Path) -> None:
    """What a model is called does not matter, only what it makes."""
    one, other = (save_small_model(tmp_path / name, seed) for name, seed in (("one", 1), ("other", 2)))
    for model, known in ((one, False), (other, False), (one, True)):
        async with encoders(nats_server, model, tmp_path) as played:
            await played.processes.start(STORE)
            await played.start("encoder-0")
            await played.processes.ready(STORE)
            encoder = OpenSoraPipeline(load_spec(model)).encoder
            expected = [encoder.encode([prompt])[0] for prompt in PROMPTS]
            if known:
                await played.found("encoder-0", expected)
            else:
                assert await played.made("encoder-0", expected) == {PromptSource.MODEL: len(PROMPTS)}
            await played.stored("encoder-0")


async def test_sharing_pays_where_encoding_takes_longer_than_a_fetch(nats_server: NatsServer) -> None:
    async with (
        await NatsBus.connect(nats_server.url, name="encoder-0") as bus,
        await UcxTensors.open(owner="encoder-0") as tensors,
    ):
        quick = SharedPrompts(bus, tensors, "quick", encode_s=1e-4)
        slow = SharedPrompts(bus, tensors, "slow", encode_s=10.0)
        forced = SharedPrompts(bus, tensors, "forced", encode_s=1e-4, always=True)
        assert (quick.pays, slow.pays, forced.pays) == (False, True, True)
        # Nobody keeps anything: that costs no more than a message.
        assert await quick.find(PROMPTS) == await slow.find(PROMPTS) == [None] * len(PROMPTS)
