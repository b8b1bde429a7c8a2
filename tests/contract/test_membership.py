"""Membership over a real broker: who is there, who has gone, and how soon the others know."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from common.bus.errors import WrongRevision
from common.bus.nats_bus import NatsBus
from common.bus.port import CaughtUp, Change
from common.bus.watching import BucketWatch
from common.messages.cluster import Heartbeat, LanguageRole, Member, MemberState, Service
from common.messages.subjects import HEARTBEATS, MEMBERS, VIDEO_BUCKETS
from common.runtime.membership import (
    MemberChange,
    MemberDraining,
    MemberJoined,
    MemberLost,
    MemberRolesChanged,
    MembershipView,
    Registration,
)
from common.runtime.settings import ServiceSettings
from tests.support.bus import eventually
from tests.support.nats_server import NatsServer

WAIT_S = 60.0


class Watcher:
    """A view, and what it told."""

    def __init__(self, bus: NatsBus, timeout_s: float) -> None:
        self.changes: asyncio.Queue[MemberChange] = asyncio.Queue(100)
        self.view = MembershipView(bus, timeout_s, self.changes.put_nowait)

    async def next(self) -> MemberChange:
        return await asyncio.wait_for(self.changes.get(), WAIT_S)


@contextlib.asynccontextmanager
async def watching(url: str, timeout_s: float = 60.0) -> AsyncIterator[Watcher]:
    async with await NatsBus.connect(url, name="watcher") as bus:
        await bus.prepare(buckets=VIDEO_BUCKETS)
        watcher = Watcher(bus, timeout_s)
        async with watcher.view.running():
            yield watcher


def settings(url: str, instance: str = "dit-0") -> ServiceSettings:
    return ServiceSettings(nats_url=url, instance=instance, slot=0, heartbeat_s=0.1)


async def test_a_member_joins_drains_and_withdraws(nats_server: NatsServer) -> None:
    async with (
        watching(nats_server.url) as watcher,
        await NatsBus.connect(nats_server.url, name="dit-0") as bus,
    ):
        async with Registration(bus, settings(nats_server.url), Service.DIT) as registration:
            assert watcher.changes.empty()
            await registration.ready()
            joined = await watcher.next()
            assert isinstance(joined, MemberJoined)
            assert (joined.member.instance, joined.member.slot) == ("dit-0", 0)
            await registration.draining()
            assert isinstance(await watcher.next(), MemberDraining)
            assert watcher.view.members["dit-0"].state is MemberState.DRAINING
        lost = await watcher.next()
        assert isinstance(lost, MemberLost) and lost.reason == "withdrew"
        assert watcher.view.members == {}


async def test_silence_is_a_loss_and_a_life_sign_brings_the_member_back(nats_server: NatsServer) -> None:
    async with watching(nats_server.url, timeout_s=1.0) as watcher:
        bus = await NatsBus.connect(nats_server.url, name="dit-0")
        registration = Registration(bus, settings(nats_server.url), Service.DIT)
        await registration.__aenter__()
        await registration.ready()
        assert isinstance(await watcher.next(), MemberJoined)
        # As after kill -9: the connection goes, the record stays.
        await bus.close()
        lost = await watcher.next()
        assert isinstance(lost, MemberLost) and "no sign of life" in lost.reason
        # It may have been lost and come back once before, where the broker stood still.
        await eventually(lambda: watcher.view.members == {})
        await registration.__aexit__(None, None, None)


async def test_while_there_is_no_broker_nobodys_silence_counts(nats_server: NatsServer) -> None:
    async with (
        watching(nats_server.url, timeout_s=6.0) as watcher,
        await NatsBus.connect(nats_server.url, name="dit-0") as bus,
        Registration(bus, settings(nats_server.url), Service.DIT) as registration,
    ):
        await registration.ready()
        assert isinstance(await watcher.next(), MemberJoined)
        await nats_server.kill()
        await asyncio.sleep(6.5)
        await nats_server.start()
        await registration.draining()
        assert isinstance(await watcher.next(), MemberDraining), "the first news since it joined"


async def test_another_life_under_the_same_name_is_a_loss_at_once(nats_server: NatsServer) -> None:
    async with (
        watching(nats_server.url, timeout_s=60.0) as watcher,
        await NatsBus.connect(nats_server.url, name="dit-0") as bus,
        Registration(bus, settings(nats_server.url), Service.DIT) as first,
    ):
        await first.ready()
        assert isinstance(await watcher.next(), MemberJoined)
        async with Registration(bus, settings(nats_server.url), Service.DIT) as second:
            lost = await watcher.next()
            assert isinstance(lost, MemberLost) and lost.reason == "restarted"
            await second.ready()
            joined = await watcher.next()
            assert isinstance(joined, MemberJoined)
            assert joined.member.incarnation == second.member.incarnation


async def test_a_former_lifes_sign_heard_late_says_nothing_of_this_one(nats_server: NatsServer) -> None:
    silent = [
        settings(nats_server.url, instance).model_copy(update={"heartbeat_s": 600.0}) for instance in ("dit-0", "dit-1")
    ]
    async with (
        watching(nats_server.url) as watcher,
        await NatsBus.connect(nats_server.url, name="dit") as bus,
        Registration(bus, silent[0], Service.DIT) as living,
        Registration(bus, silent[1], Service.DIT) as other,
    ):
        for registration in (living, other):
            await registration.ready()
            assert isinstance(await watcher.next(), MemberJoined)
        watcher.view.doubt("dit-1")
        assert isinstance(await watcher.next(), MemberLost)
        # Heard in this order; with the second everybody is looked at.
        for instance, incarnation in (("dit-0", "a former life"), ("dit-1", other.member.incarnation)):
            await bus.publish(HEARTBEATS, Heartbeat(instance=instance, incarnation=incarnation), instance)
        joined = await watcher.next()
        assert isinstance(joined, MemberJoined), "nobody else was lost"
        assert joined.member.instance == "dit-1"


async def test_a_record_nobody_stands_behind_is_not_a_member(nats_server: NatsServer) -> None:
    bus = await NatsBus.connect(nats_server.url, name="dit-0")
    await bus.prepare(buckets=VIDEO_BUCKETS)
    registration = Registration(bus, settings(nats_server.url), Service.DIT)
    await registration.__aenter__()
    await registration.ready()
    await bus.close()
    async with watching(nats_server.url, timeout_s=0.5) as watcher:
        # It has a time-out's grace, in case its next life sign is on its way.
        assert isinstance(await watcher.next(), MemberJoined)
        assert isinstance(await watcher.next(), MemberLost)
    await registration.__aexit__(None, None, None)


async def test_other_roles_are_the_same_life_and_nobody_changes_those_of_another(nats_server: NatsServer) -> None:
    async with (
        watching(nats_server.url) as watcher,
        await NatsBus.connect(nats_server.url, name="decode-0") as bus,
        Registration(bus, settings(nats_server.url, "decode-0"), Service.DECODE) as registration,
    ):
        await registration.ready(roles=(LanguageRole.DECODE,))
        joined = await watcher.next()
        assert isinstance(joined, MemberJoined)
        await registration.change_roles((LanguageRole.PREFILL,))
        changed = await watcher.next()
        assert isinstance(changed, MemberRolesChanged)
        assert changed.member == joined.member.model_copy(update={"roles": (LanguageRole.PREFILL,)})
        assert watcher.view.members["decode-0"] == changed.member
        # Written by this life, but not known to be: an acknowledgement was lost.
        await bus.put(MEMBERS, "decode-0", changed.member.model_copy(update={"roles": (LanguageRole.DECODE,)}))
        assert isinstance(await watcher.next(), MemberRolesChanged)
        await registration.change_roles((LanguageRole.PREFILL,))
        assert isinstance(await watcher.next(), MemberRolesChanged)
        async with Registration(bus, settings(nats_server.url, "decode-0"), Service.DECODE):
            with pytest.raises(WrongRevision):
                await registration.change_roles((LanguageRole.DECODE,))
            assert registration.member == changed.member
            assert isinstance(await watcher.next(), MemberLost)


async def test_who_is_cancelled_the_moment_that_the_view_has_caught_up_stops(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaving(BucketWatch[Member]):
        """Cancels the one that waits for it, once it has caught up and before anybody else has a turn."""

        caught_up = False

        async def __anext__(self) -> Change[Member] | CaughtUp:
            if self.caught_up:
                starting.cancel()
            change = await super().__anext__()
            self.caught_up = isinstance(change, CaughtUp)
            return change

    monkeypatch.setattr("common.bus.nats_bus.BucketWatch", Leaving)
    begun = False

    async def start() -> None:
        nonlocal begun
        async with MembershipView(bus, timeout_s=60.0).running():
            begun = True

    async with await NatsBus.connect(nats_server.url, name="watcher") as bus:
        await bus.prepare(buckets=VIDEO_BUCKETS)
        starting = asyncio.create_task(start())
        await asyncio.wait((starting,), timeout=WAIT_S)
        assert starting.cancelled() and not begun
