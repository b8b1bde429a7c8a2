"""Asks language instances directly, in the place of a gateway: which instance does what is the test's to say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from common.bus.nats_bus import NatsBus
from common.messages.chat import GenerateTokens, Sampling, TokensGenerated, pack_tokens
from common.messages.subjects import GENERATE_TOKENS, MEMBERS, TOKENS_GENERATED

_GATEWAY = "gateway-0"
_WAIT_S = 120.0


@dataclass(frozen=True)
class Told:
    """An answer, and of how many tokens before it keys and values were there."""

    tokens: list[int]
    cached: int


class Asker:
    """One answer at a time, or many."""

    def __init__(self, bus: NatsBus) -> None:
        self.bus = bus
        self._heard: dict[str, asyncio.Queue[TokensGenerated]] = {}
        self._asked = 0

    def hear(self, news: TokensGenerated) -> None:
        for sequence in news.sequences:
            if sequence.request_id in self._heard:
                self._heard[sequence.request_id].put_nowait(news)

    async def ask(self, prompt: Sequence[int], count: int, prefill: str, decode: str | None = None) -> Told:
        """A greedy answer; ``decode``: another instance that goes on from the first token; empty: who, is not said."""
        self._asked += 1
        name = f"asked-{self._asked}"
        heard = self._heard[name] = asyncio.Queue(1000)
        request = GenerateTokens(
            request_id=name,
            epoch=1,
            tokens=pack_tokens(prompt),
            sampling=Sampling(temperature=0.0, seed=0, max_tokens=count),
            gateway=_GATEWAY,
            decode=prefill if decode is None else decode,
            created_at_s=0.0,
        )
        await self.bus.request(GENERATE_TOKENS, request, prefill, deadline_s=_WAIT_S)
        tokens: list[int] = []
        cached = 0
        async with asyncio.timeout(_WAIT_S):
            while True:
                for sequence in (await heard.get()).sequences:
                    if sequence.request_id != name:
                        continue
                    assert sequence.failure is None, sequence.failure
                    assert sequence.offset == len(tokens)
                    tokens += sequence.tokens
                    cached = max(cached, sequence.cached_tokens) if len(tokens) == 1 else cached
                    if sequence.finish is not None:
                        del self._heard[name]
                        return Told(tokens, cached)


@contextlib.asynccontextmanager
async def asker(url: str) -> AsyncIterator[Asker]:
    async with await NatsBus.connect(url, name="asking") as bus:
        await bus.prepare(buckets=(MEMBERS,))
        asking = Asker(bus)
        subscription = await bus.subscribe(TOKENS_GENERATED, asking.hear, _GATEWAY)
        try:
            yield asking
        finally:
            await subscription.stop()
