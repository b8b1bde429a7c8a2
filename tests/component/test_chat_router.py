"""The scheduler's chat router over a real broker: when it begins to route."""

import asyncio
from typing import Any

import pytest

from common.bus.errors import NobodyThere, RemoteFailure
from common.bus.nats_bus import NatsBus
from common.messages.chat import RouteChat
from common.messages.subjects import ROUTE_CHAT
from common.policies.language.chat_rule import ChatRule, FewestTokens, guessed_costs
from services.scheduler.chat import ChatRouter
from tests.support.language import WAIT_S
from tests.support.nats_server import NatsServer


class HeldUp(NatsBus):
    """A bus that is slow to listen: only once it is ``free``; ``asked`` tells that it has been asked to."""

    asked: asyncio.Event
    free: asyncio.Event

    async def subscribe(self, *args: Any, **options: Any) -> Any:
        self.asked.set()
        await self.free.wait()
        return await super().subscribe(*args, **options)


async def test_nobody_is_routed_before_the_end_of_it_can_be_heard(nats_server: NatsServer) -> None:
    asked = RouteChat(request_id="a", gateway="gateway-0", prompt_tokens=1, max_tokens=1, wait_s=0.1, created_at_s=0.0)
    stop = asyncio.Event()
    async with (
        await NatsBus.connect(nats_server.url, name="gateway-0") as bus,
        await HeldUp.connect(nats_server.url, name="scheduler") as own,
        asyncio.timeout(WAIT_S),
        asyncio.TaskGroup() as tasks,
    ):
        own.asked, own.free, routing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        rule = ChatRule(FewestTokens(), guessed_costs(2000.0, 20_000.0))

        async def route() -> None:
            async with ChatRouter(own, 1, lambda _: None, rule, False).running():
                routing.set()
                await stop.wait()

        tasks.create_task(route())
        await own.asked.wait()
        with pytest.raises(NobodyThere):
            await bus.request(ROUTE_CHAT, asked, deadline_s=WAIT_S)
        own.free.set()
        await routing.wait()
        with pytest.raises(RemoteFailure, match="no prefill and decode instance"):
            await bus.request(ROUTE_CHAT, asked, deadline_s=WAIT_S)
        stop.set()
