"""Membership: each process keeps its record in the members bucket and gives signs of life; others watch both.

A member is lost when its record goes, when another incarnation takes its name, or when its heartbeats stop for
longer than the time-out. The record alone is not proof of life: it outlives a killed process.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import uuid4

import structlog

from common.bus.errors import BusError, WrongRevision
from common.bus.port import Bus, Change
from common.messages.cluster import (
    Heartbeat,
    LanguageModelInfo,
    LanguageRole,
    Member,
    MemberState,
    Service,
    VideoModelInfo,
)
from common.messages.subjects import HEARTBEATS, MEMBERS
from common.runtime.settings import ServiceSettings

log = structlog.get_logger()

# A bucket's records are read that long at most before the view counts as broken.
_CATCH_UP_S = 10.0


class Registration:
    """This process's own membership: ``async with`` registers it as starting and withdraws it at the end."""

    def __init__(self, bus: Bus, settings: ServiceSettings, service: Service, device: str = "cpu") -> None:
        self._bus = bus
        self._period_s = settings.heartbeat_s
        self.member = Member(
            instance=settings.instance_of(service),
            incarnation=uuid4().hex,
            service=service,
            state=MemberState.STARTING,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at_s=time.time(),
            slot=settings.slot,
            device=device,
        )
        self._revision = 0
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._revision = await self._bus.put(MEMBERS, self.member.instance, self.member)
        self._beating = asyncio.create_task(self._beat(), name="heartbeat")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating
        with contextlib.suppress(BusError):
            await self._bus.delete(MEMBERS, self.member.instance)

    async def ready(
        self,
        video_model: VideoModelInfo | None = None,
        meeting: str = "",
        language_model: LanguageModelInfo | None = None,
        roles: tuple[LanguageRole, ...] = (),
    ) -> None:
        """Announce that this process takes work now; ``meeting``: where groups meet that it leads."""
        offers = {"meeting": meeting, "language_model": language_model, "roles": roles}
        self.member = self.member.model_copy(update=offers)
        await self._move(MemberState.READY, video_model)

    async def change_roles(self, roles: tuple[LanguageRole, ...]) -> None:
        """Announce that this process takes other work from now on; it is the same life of it.

        Raises:
            WrongRevision: the record is another life's by now.
            BusError: it was not announced, as far as is known.
        """
        changed = self.member.model_copy(update={"roles": roles})
        try:
            self._revision = await self._bus.replace(MEMBERS, self.member.instance, changed, self._revision)
        except WrongRevision:
            entry = await self._bus.get(MEMBERS, self.member.instance)
            if entry.value.incarnation != self.member.incarnation:
                raise
            # A write of ours of which we have not heard.
            changed = entry.value.model_copy(update={"roles": roles})
            self._revision = await self._bus.replace(MEMBERS, self.member.instance, changed, entry.revision)
        self.member = self.member.model_copy(update={"roles": roles})

    async def draining(self) -> None:
        """Announce that this process takes no new work."""
        with contextlib.suppress(BusError):
            await self._move(MemberState.DRAINING, self.member.video_model)

    async def _move(self, state: MemberState, video_model: VideoModelInfo | None) -> None:
        self.member = self.member.model_copy(update={"state": state, "video_model": video_model})
        self._revision = await self._bus.put(MEMBERS, self.member.instance, self.member)

    async def _beat(self) -> None:
        life_sign = Heartbeat(instance=self.member.instance, incarnation=self.member.incarnation)
        while True:
            try:
                await self._bus.publish(HEARTBEATS, life_sign, self.member.instance)
            except BusError as error:
                log.warning("heartbeat not sent", reason=str(error))
            await asyncio.sleep(self._period_s)


@dataclass(frozen=True)
class MemberJoined:
    """A member is ready for work."""

    member: Member


@dataclass(frozen=True)
class MemberRolesChanged:
    """A member goes on in other roles; it is the same life of it."""

    member: Member


@dataclass(frozen=True)
class MemberDraining:
    """A member finishes what it has and takes nothing new."""

    member: Member


@dataclass(frozen=True)
class MemberLost:
    """A member is gone with all it held: it withdrew, died, or was replaced by another incarnation."""

    member: Member
    reason: str


MemberChange = MemberJoined | MemberRolesChanged | MemberDraining | MemberLost


class MembershipView:
    """The living members, kept current by the bucket's watch and the heartbeats.

    ``listen`` is called with every change among the members that have been ready, in order.
    """

    def __init__(self, bus: Bus, timeout_s: float, listen: Callable[[MemberChange], None] | None = None) -> None:
        self._bus = bus
        self._timeout_s = timeout_s
        self._listen = listen
        self._records: dict[str, Member] = {}
        self._heard_s: dict[str, float] = {}
        self._ready: dict[str, Member] = {}
        self._caught_up = asyncio.Event()

    @property
    def members(self) -> dict[str, Member]:
        """Every living member by instance, whatever its state."""
        now_s = time.monotonic()
        return {name: member for name, member in self._records.items() if self._alive(member, now_s)}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Keep the view current while the block runs; it has caught up with the bucket when the block starts."""
        heartbeats = await self._bus.subscribe(HEARTBEATS, self._heard)
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(), name="membership-watch")
                checking = tasks.create_task(self._check(), name="membership-timeouts")
                # ``wait_for`` forgets, before Python 3.12, a cancellation that comes together with the event.
                async with asyncio.timeout(_CATCH_UP_S):
                    await self._caught_up.wait()
                try:
                    yield self
                finally:
                    watching.cancel()
                    checking.cancel()
        finally:
            await heartbeats.stop()

    def doubt(self, instance: str) -> None:
        """It does not answer: take it for lost until its next life sign."""
        self._heard_s[instance] = float("-inf")
        self._update()

    async def _watch(self) -> None:
        async for change in self._bus.watch(MEMBERS):
            if not isinstance(change, Change):
                self._caught_up.set()
                continue
            if change.value is None:
                self._records.pop(change.key, None)
            else:
                self._records[change.key] = change.value
                # A fresh record is a life sign; one found at start-up gets a time-out's grace to give another.
                self._heard_s[change.key] = time.monotonic()
            self._update()

    def _heard(self, beat: Heartbeat) -> None:
        record = self._records.get(beat.instance)
        if record is None or record.incarnation != beat.incarnation:
            # The last of a former life, heard late, says nothing of this one; and what is ahead of its record is heard
            # again with that.
            return
        self._heard_s[beat.instance] = time.monotonic()
        if beat.instance not in self._ready:
            self._update()

    async def _check(self) -> None:
        period_s = self._timeout_s / 4
        while True:
            slept_from_s = time.monotonic()
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            if now_s - slept_from_s > 2 * period_s or not self._bus.connected:
                # It was this process that stood still, or was cut off: the others' life signs cannot be heard, so none
                # is late.
                self._heard_s = dict.fromkeys(self._heard_s, now_s)
            self._update()

    def _alive(self, member: Member, now_s: float) -> bool:
        """Whether it has given a sign of life lately; of a member by its record, as only its own life's are kept."""
        return now_s - self._heard_s.get(member.instance, float("-inf")) <= self._timeout_s

    def _update(self) -> None:
        now_s = time.monotonic()
        for name, member in list(self._ready.items()):
            reason = self._why_lost(member, now_s)
            record = self._records.get(name)
            if reason or record is None:
                del self._ready[name]
                self._tell(MemberLost(member, reason))
            elif record != member:
                self._ready[name] = record
                if record.roles != member.roles:
                    self._tell(MemberRolesChanged(record))
                if record.state is MemberState.DRAINING and member.state is not MemberState.DRAINING:
                    self._tell(MemberDraining(record))
        for name, record in self._records.items():
            if name not in self._ready and record.state is MemberState.READY and self._alive(record, now_s):
                self._ready[name] = record
                self._tell(MemberJoined(record))

    def _why_lost(self, member: Member, now_s: float) -> str:
        record = self._records.get(member.instance)
        if record is None:
            return "withdrew"
        if record.incarnation != member.incarnation:
            return "restarted"
        if not self._alive(member, now_s):
            return f"does not answer, or gave no sign of life for {self._timeout_s:g} s"
        return ""

    def _tell(self, change: MemberChange) -> None:
        if self._listen is not None:
            self._listen(change)
