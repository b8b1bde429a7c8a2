"""The cluster monitor over a real broker: who decodes is told to all who prefill, and who is silent is left out."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from common.bus.nats_bus import NatsBus
from common.messages.cluster import LanguageRole, MemberState
from common.messages.dispatch import DecodeLoad, DecodeLoads
from common.messages.subjects import DECODE_LOADS, LOAD_REPORTED
from common.policies.language.chat_rule import ChatRule, FewestTokens, guessed_costs
from common.runtime.membership import MemberDraining, MemberJoined, MemberRolesChanged
from services.scheduler.chat import ChatRouter
from services.scheduler.decode_loads import DecodeLoadMonitor
from tests.support.language import WAIT_S, language_member
from tests.support.nats_server import NatsServer

PREFILL, DECODE = (LanguageRole.PREFILL,), (LanguageRole.DECODE,)


class Listener:
    """Hears broadcasts, and reports as decode instances do."""

    def __init__(self, bus: NatsBus) -> None:
        self.bus = bus
        self.heard: asyncio.Queue[DecodeLoads] = asyncio.Queue(10_000)

    async def report(self, name: str, free_blocks: int = 10) -> None:
        load = DecodeLoad(instance=name, free_blocks=free_blocks, heavy=0, light=0)
        await self.bus.publish(LOAD_REPORTED, load)

    async def until_names(self, *names: str) -> None:
        """Return once a broadcast has these, and no others."""
        async with asyncio.timeout(WAIT_S):
            while await self.next_names() != set(names):
                pass

    async def next_names(self) -> set[str]:
        return {load.instance for load in (await self.heard.get()).loads}

    async def nothing(self, bus: NatsBus) -> bool:
        """Whether nothing is told for a while. ``bus`` is the monitor's: what it has sent comes before these marks."""
        for wait_s, mark in ((0.8, "before"), (0.0, "after")):
            load = DecodeLoad(instance=mark, free_blocks=0, heavy=0, light=0)
            await bus.publish(DECODE_LOADS, DecodeLoads(loads=(load,)))
            if mark == "before":
                await self.until_names(mark)
            await asyncio.sleep(wait_s)
        told = await asyncio.wait_for(self.heard.get(), WAIT_S)
        return [load.instance for load in told.loads] == ["after"]


@contextlib.asynccontextmanager
async def monitored(nats_server: NatsServer) -> AsyncIterator[tuple[DecodeLoadMonitor, Listener, NatsBus]]:
    async with contextlib.AsyncExitStack() as opened:
        listener = Listener(await opened.enter_async_context(await NatsBus.connect(nats_server.url, name="listener")))
        await listener.bus.subscribe(DECODE_LOADS, listener.heard.put_nowait)
        bus = await opened.enter_async_context(await NatsBus.connect(nats_server.url, name="scheduler"))
        monitor = DecodeLoadMonitor(bus)
        await opened.enter_async_context(monitor.running())
        yield monitor, listener, bus


async def test_reports_are_told_as_long_as_they_come(nats_server: NatsServer) -> None:
    async with monitored(nats_server) as (monitor, listener, _):
        monitor.has_roles("decode-0", DECODE)
        monitor.has_roles("decode-1", DECODE)
        monitor.has_roles("prefill-0", PREFILL)
        # Of the last two, one is not known, and one does not decode.
        speaking = {"decode-0", "decode-1", "stranger", "prefill-0"}

        async def speak() -> None:
            for number in range(10_000):
                for name in tuple(speaking):
                    await listener.report(name, number)
                await asyncio.sleep(0.1)

        task = asyncio.create_task(speak())
        try:
            await listener.until_names("decode-0", "decode-1")
            speaking.discard("decode-1")
            await listener.until_names("decode-0")
        finally:
            task.cancel()


async def test_who_takes_nothing_new_is_left_out_at_once(nats_server: NatsServer) -> None:
    async with monitored(nats_server) as (monitor, listener, bus):
        monitor.has_roles("fused-0", (*PREFILL, *DECODE))
        monitor.has_roles("decode-0", DECODE)
        await listener.report("decode-0")
        # Nobody is there who would hand over.
        assert await listener.nothing(bus)
        monitor.has_roles("prefill-0", PREFILL)
        async with asyncio.timeout(WAIT_S):
            names = set[str]()
            while names != {"decode-0"}:
                # Once more, in case it was stale by the time it was to be told.
                await listener.report("decode-0")
                names = await listener.next_names()
        monitor.has_roles("decode-0", ())
        await listener.report("decode-0")
        await listener.until_names()
        # It flips.
        monitor.has_roles("prefill-0", DECODE)
        assert await listener.nothing(bus)


async def test_who_drains_is_left_out_whatever_its_roles_become(nats_server: NatsServer) -> None:
    """It was asked to flip, and has begun to leave."""
    async with (
        await NatsBus.connect(nats_server.url, name="listener") as bus,
        await NatsBus.connect(nats_server.url, name="scheduler") as own,
    ):
        listener = Listener(bus)
        await bus.subscribe(DECODE_LOADS, listener.heard.put_nowait)
        router = ChatRouter(own, 1, lambda _: None, ChatRule(FewestTokens(), guessed_costs(2000.0, 20_000.0)), True)
        async with router.running():
            for name, roles in (("decode-0", DECODE), ("decode-1", DECODE), ("prefill-0", PREFILL)):
                router.member_changed(MemberJoined(language_member(name, roles)))
            await listener.report("decode-1")
            await listener.report("decode-0")
            leaving = language_member("decode-1", DECODE, MemberState.DRAINING)
            router.member_changed(MemberDraining(leaving))
            router.member_changed(MemberRolesChanged(leaving.model_copy(update={"roles": (*DECODE, *PREFILL)})))
            told: dict[str, int] = {}
            async with asyncio.timeout(WAIT_S):
                while told.get("decode-0") != 20:
                    # What was heard of both before may still be on its way; these reports come after, in this order.
                    await listener.report("decode-1", 20)
                    await listener.report("decode-0", 20)
                    told = {load.instance: load.free_blocks for load in (await listener.heard.get()).loads}
            assert set(told) == {"decode-0"}


async def test_it_stops_when_it_is_told_to_whatever_has_just_come(nats_server: NatsServer) -> None:
    async with await NatsBus.connect(nats_server.url, name="scheduler") as bus:
        for turns in range(6):
            monitor = DecodeLoadMonitor(bus)
            async with asyncio.timeout(WAIT_S):
                async with monitor.running():
                    await asyncio.sleep(0.01)
                    monitor.has_roles("decode-0", DECODE)
                    for _ in range(turns):
                        await asyncio.sleep(0)
