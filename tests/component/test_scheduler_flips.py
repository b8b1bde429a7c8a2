"""A scheduler that has roles flip: prompts wait, and somebody who decodes comes to prefill; what fails is forgotten."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from common.bus.errors import NobodyThere, Refusal
from common.bus.nats_bus import NatsBus
from common.messages.chat import ChatRoute, RouteChat
from common.messages.cluster import FlipRole, LanguageRole, RoleFlipped, Service
from common.messages.failures import Failure, Stage
from common.messages.subjects import FLIP_ROLE, ROUTE_CHAT, VIDEO_BUCKETS, VIDEO_OBJECTS, VIDEO_QUEUES
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from tests.component.chat_support import DECODE, PREFILL, scheduler
from tests.component.gateway_support import until
from tests.support.language import INFO
from tests.support.nats_server import NatsServer

PATIENCE_S = 60.0


class Played:
    """A language instance that flips, or says why not, and does nothing else."""

    def __init__(self, bus: NatsBus, registration: Registration, refuses: bool) -> None:
        self._bus = bus
        self._registration = registration
        self.refuses = refuses
        self.asked: asyncio.Queue[FlipRole] = asyncio.Queue(100)
        self.flipped = asyncio.Event()

    async def flip(self, asked: FlipRole) -> RoleFlipped:
        self.asked.put_nowait(asked)
        if self.refuses:
            raise Refusal(Failure(stage=Stage.DECODE, code="not_flipped", message="not now", retryable=True))
        await self._registration.change_roles(asked.roles)
        self.flipped.set()
        return RoleFlipped(instance=self._registration.member.instance, roles=asked.roles, flip_s=0.001)


@contextlib.asynccontextmanager
async def played(url: str, name: str, roles: tuple[LanguageRole, ...], refuses: bool = False) -> AsyncIterator[Played]:
    service = Service.PREFILL if roles == PREFILL else Service.DECODE
    settings = ServiceSettings(nats_url=url, instance=name, heartbeat_s=0.1)
    async with (
        await NatsBus.connect(url, name=name) as bus,
        Registration(bus, settings, service) as registration,
    ):
        instance = Played(bus, registration, refuses)
        await bus.serve(FLIP_ROLE, instance.flip, name)
        await registration.ready(language_model=INFO, roles=roles)
        yield instance


async def routed(bus: NatsBus, number: int) -> ChatRoute:
    asked = RouteChat(
        request_id=f"r{number}",
        gateway="gateway-0",
        prompt_tokens=10,
        max_tokens=10,
        wait_s=PATIENCE_S,
        created_at_s=float(number),
    )
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await bus.request(ROUTE_CHAT, asked, deadline_s=PATIENCE_S)
            except NobodyThere:
                # The scheduler is still starting.
                await asyncio.sleep(0.05)


async def test_who_decodes_comes_to_prefill_where_prompts_wait_but_never_the_last_one(nats_server: NatsServer) -> None:
    url = nats_server.url
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(await NatsBus.connect(url, name="gateway-0"))
        await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
        await opened.enter_async_context(scheduler(url, flip="queue", flip_cost_s=0.5))
        await opened.enter_async_context(played(url, "prefill-0", PREFILL))
        last = await opened.enter_async_context(played(url, "decode-1", DECODE))
        number = 0
        for number in range(8):
            await routed(bus, number)
        # Nobody computes them, so they wait, and then there is a second one who decodes. Who refuses keeps its role,
        # and is asked again after as much waiting.
        coming = await opened.enter_async_context(played(url, "decode-0", DECODE, refuses=True))
        asked = await asyncio.wait_for(coming.asked.get(), PATIENCE_S)
        assert (asked.roles, asked.decode) == (PREFILL, ("decode-1",))
        assert (await asyncio.wait_for(coming.asked.get(), PATIENCE_S)).roles == PREFILL
        coming.refuses = False
        # What is routed before that may be routed by a flip that is still being refused.
        await asyncio.wait_for(coming.flipped.wait(), PATIENCE_S)

        async def prefills() -> bool:
            nonlocal number
            number += 1
            route = await routed(bus, number)
            return (route.prefill, route.decode) == ("decode-0", "decode-1")

        await until(prefills, deadline_s=PATIENCE_S)
        # Prompts go on waiting, and the last one who decodes stays.
        for number in range(100, 120):
            await routed(bus, number)
        await asyncio.sleep(1.0)
        assert last.asked.empty()
