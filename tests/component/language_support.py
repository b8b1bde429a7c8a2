"""A gateway and a scheduler over one broker, for real language instances; and prompts whose answers are known."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai

from common.bus.errors import BusError
from common.bus.nats_bus import NatsBus
from common.messages.kv_index import AskView
from common.messages.subjects import TELL_VIEW
from gateway.config import GatewaySettings
from gateway.service import Gateway, bind, running_gateway
from tests.component.chat_support import scheduler
from tests.component.gateway_support import CLIENT_S, PATIENT, until
from tests.support.language_model import greedy
from tests.support.tiny_tokenizer import tiny_tokenizer

# Logits of other batches differ by rounding.
_MARGIN = 1e-4
ANSWER = 64


@dataclass(frozen=True)
class LanguageStack:
    bus: NatsBus
    gateway: Gateway
    client: openai.AsyncOpenAI
    model: str

    async def stream(
        self, prompt: Sequence[int], count: int = ANSWER, **fields: Any
    ) -> openai.AsyncStream[openai.types.Completion]:
        """A streamed completion of token ids, greedy unless the fields say otherwise."""
        asked: dict[str, Any] = {"temperature": 0} | fields
        return await self.client.completions.create(
            model=self.model, prompt=list(prompt), max_tokens=count, stream=True, **asked
        )

    async def text(self, prompt: Sequence[int], count: int = ANSWER, **fields: Any) -> str:
        """What a stream brings."""
        stream = await self.stream(prompt, count, **fields)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def served(self, *instances: str) -> None:
        """Return once gateway and scheduler have these instances ready."""

        async def ready() -> bool:
            edge = self.gateway.edge
            states = {name: member.state for name, member in edge.members().items()}
            if not edge.catalogue.language_models or any(states.get(name) != "ready" for name in instances):
                return False
            known = await self._routed_to()
            return known is not None and known.issuperset(instances)

        await until(ready, deadline_s=120.0)

    async def lost(self, instance: str) -> None:
        """Return once gateway and scheduler know that it is gone."""

        async def gone() -> bool:
            known = await self._routed_to()
            return instance not in self.gateway.edge.members() and known is not None and instance not in known

        await until(gone, deadline_s=120.0)

    async def _routed_to(self) -> set[str] | None:
        """Of whom the scheduler knows, and what they have; None: it does not say."""
        with contextlib.suppress(BusError):
            view = await self.bus.request(TELL_VIEW, AskView())
            return {viewed.instance for viewed in view.instances if not viewed.awaited}
        return None


@contextlib.asynccontextmanager
async def language_stack(
    url: str, folder: Path, dispatch: str = "scheduler", **settings: Any
) -> AsyncIterator[LanguageStack]:
    """``folder`` holds the model; ``dispatch`` is the scheduler's, ``settings`` are the gateway's.

    Nobody is taken for lost, and nothing begun anew unless they say so, because this machine is busy.
    """
    async with contextlib.AsyncExitStack() as opened:
        await opened.enter_async_context(scheduler(url, dispatch=dispatch))
        bus = await opened.enter_async_context(await NatsBus.connect(url, name="gateway-0"))
        own = GatewaySettings(
            nats_url=url,
            port=0,
            instance="gateway-0",
            language_model=str(folder),
            route_s=60.0,
            **(PATIENT | {"silence_s": 20.0} | settings),
        )
        listener = opened.enter_context(bind(own))
        gateway = await opened.enter_async_context(running_gateway(bus, own, listener))
        client = await opened.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=CLIENT_S)
        )
        yield LanguageStack(bus, gateway, client, folder.name)


@cache
def known_prompts(folder: Path) -> dict[tuple[int, ...], list[int]]:
    """Prompts of different lengths with the ``ANSWER`` tokens that follow greedily; none is near a tie, none ends."""
    chance = random.Random(3)
    found: dict[tuple[int, ...], list[int]] = {}
    for length in (1, 7, 16, 33, 60, 90):
        answer = None
        while answer is None or answer.margin < _MARGIN or len(answer.tokens) < ANSWER:
            prompt = tuple(chance.randrange(0, 256) for _ in range(length))
            answer = greedy(folder, prompt, ANSWER)
        found[prompt] = answer.tokens
    return found


def shown(tokens: list[int]) -> str:
    """The text a client sees."""
    text: str = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    return text


async def gathered(*work: Any) -> list[Any]:
    """All results, within a long while."""
    async with asyncio.timeout(240.0):
        return list(await asyncio.gather(*work))


class Clients:
    """``count`` at once, who ask ``stack`` for what is known, one answer after the other, while something is done."""

    def __init__(
        self, stack: LanguageStack, prompts: dict[tuple[int, ...], list[int]], count: int, chance: random.Random
    ) -> None:
        self._stack = stack
        self._prompts = prompts
        self._count = count
        self._chance = chance
        self._enough = asyncio.Event()
        self.answered = 0

    async def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Ask until ``work`` is done, and for the last answers to be right."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._count):
                tasks.create_task(self._ask())
            await work
            self._enough.set()

    async def some_more(self) -> None:
        """Return once as many answers have come as there are clients."""
        enough = self.answered + self._count
        async with asyncio.timeout(120):
            while self.answered < enough:  # noqa: ASYNC110 - clients at their work
                await asyncio.sleep(self._chance.uniform(0.0, 0.02))

    async def _ask(self) -> None:
        while not self._enough.is_set():
            prompt = self._chance.choice(list(self._prompts))
            assert await self._stack.text(prompt) == shown(self._prompts[prompt])
            self.answered += 1
