"""Language instances and other services as processes of their own, asked directly in the place of a gateway."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.bus.nats_bus import NatsBus
from common.messages.chat import GenerateTokens, Sampling, TokensGenerated, pack_tokens
from common.messages.cluster import MemberState
from common.messages.subjects import GENERATE_TOKENS, MEMBERS, TOKENS_GENERATED
from loadgen.bench.process import BenchmarkError, child, end
from loadgen.counts import HEAD_WIDTH

VOCABULARY = 1024
_GATEWAY = "gateway-bench"
_WAIT_S = 120.0


def save_model(folder: Path, hidden: int, layers: int, context: int) -> Path:
    """Write a Llama with random weights; as many heads for keys and values as for queries, ``HEAD_WIDTH`` each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        num_key_value_heads=hidden // HEAD_WIDTH,
        max_position_embeddings=context,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextlib.asynccontextmanager
async def running_service(url: str, service: str, name: str, settings: Mapping[str, str]) -> AsyncIterator[None]:
    """A process of ``service`` while the block runs. ``settings``: environment variables beside the usual ones."""
    environment = {
        **os.environ,
        "TRIPTYCH_NATS_URL": url,
        "TRIPTYCH_INSTANCE": name,
        "TRIPTYCH_LOG_LEVEL": "warning",
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "lo",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        **settings,
    }
    process = await child(sys.executable, "-m", f"services.{service}", environment=environment)
    try:
        yield
    finally:
        await end(process, _WAIT_S)


async def ready(bus: NatsBus, name: str) -> None:
    """Return once a process takes work."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            with contextlib.suppress(Exception):
                if (await bus.get(MEMBERS, name)).value.state is MemberState.READY:
                    return
            await asyncio.sleep(0.1)


@dataclass
class Asked:
    """One sequence: when its tokens came, by ``time.perf_counter``, and what its prompt's instance had found."""

    began_s: float
    came_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def first_s(self) -> float:
        """To the first token."""
        return self.came_s[0] - self.began_s


class Asking:
    """Asks instances for greedy answers."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._asked: dict[str, Asked] = {}

    async def listen(self) -> None:
        """Hear answers, until the bus is closed."""
        await self._bus.subscribe(TOKENS_GENERATED, self._hear, _GATEWAY)

    async def ask(self, prompt: Sequence[int], answer_tokens: int, prefill: str, decode: str) -> Asked:
        """Ask, and do not wait for the answer: see ``answered``."""
        name = f"asked-{len(self._asked)}"
        self._asked[name] = asked = Asked(time.perf_counter())
        request = GenerateTokens(
            request_id=name,
            epoch=1,
            tokens=pack_tokens(prompt),
            sampling=Sampling(temperature=0.0, seed=0, max_tokens=answer_tokens, ignore_end=True),
            gateway=_GATEWAY,
            decode=decode,
            created_at_s=time.time(),
        )
        await self._bus.request(GENERATE_TOKENS, request, prefill, deadline_s=_WAIT_S)
        return asked

    def _hear(self, news: TokensGenerated) -> None:
        now_s = time.perf_counter()
        for sequence in news.sequences:
            one = self._asked[sequence.request_id]
            if sequence.failure is not None:
                raise BenchmarkError(sequence.failure.message)
            if not one.came_s:
                one.cached_tokens = sequence.cached_tokens
            one.came_s += [now_s] * len(sequence.tokens)
            if sequence.finish is not None:
                one.done.set()


async def answered(asked: Sequence[Asked]) -> None:
    """Return once all have been answered."""
    async with asyncio.timeout(_WAIT_S):
        await asyncio.gather(*(one.done.wait() for one in asked))
