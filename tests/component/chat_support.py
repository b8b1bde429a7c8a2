"""A gateway, a scheduler and played language instances over one broker."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from common.bus.nats_bus import NatsBus
from common.messages.cluster import LanguageRole, MemberState
from gateway.config import GatewaySettings
from gateway.service import Gateway, bind, running_gateway
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import serve as serve_scheduler
from tests.component.gateway_support import PATIENT, until
from tests.support.language import FUSED, PlayedLanguageWorker, played_language_worker
from tests.support.nats_server import NatsServer
from tests.support.tiny_tokenizer import write_tokenizer

PREFILL = (LanguageRole.PREFILL,)
DECODE = (LanguageRole.DECODE,)
# Text that answers every prompt, unless a test has its own. Its emoji are four bytes, so four tokens, each.
ANSWER = "hello world, 😀 héllo 👩‍🚀 hello!"


def always(prompt: str) -> str:
    """The same answer to every prompt."""
    return ANSWER


@dataclass(frozen=True)
class ChatStack:
    """``workers`` by instance name."""

    gateway: Gateway
    http: aiohttp.ClientSession
    workers: dict[str, PlayedLanguageWorker]
    broker: NatsServer

    @property
    def url(self) -> str:
        return self.gateway.url

    async def call(self, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """One request that is answered at once; status and body."""
        async with self.http.post(path, json=fields) as response:
            body: dict[str, Any] = await response.json()
            return response.status, body

    async def chat(self, **fields: Any) -> dict[str, Any]:
        status, body = await self.call("/v1/chat/completions", **MESSAGES | fields)
        assert status == 200, body
        return body


MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "say hello"}]}


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """A stream's events up to [DONE], which must be the last thing in it."""
    done = False
    async for raw in response.content:
        line = raw.decode().strip()
        if line:
            assert not done, line
            assert line.startswith("data: "), line
            done = line == "data: [DONE]"
            if not done:
                yield json.loads(line[6:])
    assert done


@contextlib.asynccontextmanager
async def scheduler(url: str, **settings: Any) -> AsyncIterator[None]:
    """A real scheduler, in this process."""
    stop = asyncio.Event()
    own = SchedulerSettings(nats_url=url, instance="scheduler-0", drain_s=0.0, **(PATIENT | settings))
    running = asyncio.create_task(serve_scheduler(own, stop))
    try:
        yield
    finally:
        stop.set()
        await running


@contextlib.asynccontextmanager
async def chat_stack(
    broker: NatsServer,
    folder: Path,
    *,
    script: Callable[[str], str] = always,
    roles: Mapping[str, tuple[LanguageRole, ...]] | None = None,
    scheduled: bool = True,
    bus_type: type[NatsBus] = NatsBus,
    **settings: Any,
) -> AsyncIterator[ChatStack]:
    """``roles``: of each instance by name; without it, there is one fused instance. ``scheduled``: with a scheduler.

    ``bus_type``: of the gateway's.
    """
    async with contextlib.AsyncExitStack() as opened:
        if scheduled:
            await opened.enter_async_context(scheduler(broker.url))
        bus = await opened.enter_async_context(await bus_type.connect(broker.url, name="gateway-0"))
        tokenizer = str(write_tokenizer(folder))
        own = GatewaySettings(port=0, instance="gateway-0", language_model=tokenizer, **(PATIENT | settings))
        listener = opened.enter_context(bind(own))
        gateway = await opened.enter_async_context(running_gateway(bus, own, listener))
        http = await opened.enter_async_context(aiohttp.ClientSession(gateway.url))
        workers = {}
        for name, own_roles in (roles or {"fused-0": FUSED}).items():
            workers[name] = await opened.enter_async_context(
                played_language_worker(broker.url, name, script, own_roles)
            )
        running = ChatStack(gateway, http, workers, broker)
        present = {*workers, "scheduler-0"} if scheduled else set(workers)

        async def served() -> bool:
            members = gateway.edge.members()
            ready = {name for name, member in members.items() if member.state is MemberState.READY}
            return bool(gateway.edge.catalogue.language_models) and present <= ready

        await until(served)
        yield running
