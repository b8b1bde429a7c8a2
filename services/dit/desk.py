"""Where a DiT worker hears of leases: answers who grants, revokes, parks or calls, and says what to begin with next."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from common.bus.errors import Refusal
from common.bus.port import Bus, Subscription
from common.messages.failures import Acknowledged
from common.messages.subjects import GRANT_LEASE, GROUP_CALLED, PARK_JOB, REVOKE_LEASE
from common.messages.video import GroupCalled, Lease, LeasesRevoked, ParkJob, RevokeLease
from common.policies.fence import StaleEpoch
from common.runtime.leases import Reporter
from services.dit.book import LeaseBook

log = structlog.get_logger()

# Longer than any step takes that this worker may have to finish before it is free.
FREE_DEADLINE_S = 60.0
# Who asks what was let go waits so long for the end of the step under way.
LET_GO_DEADLINE_S = 2.0


@dataclass(frozen=True)
class Rest:
    """A job that this worker can neither go on with nor forget yet.

    ``owed``: whether the scheduler has to hear of it if no lease comes; ``broken``: whether the group fell apart, so
    that only a lease that heals will do; ``until_s``: on the event loop's clock.
    """

    lease: Lease
    owed: bool
    broken: bool
    until_s: float


class LeaseDesk:
    """The event loop's side of a `LeaseBook`. ``idle`` is set while there is nothing to do and nothing to wait for."""

    def __init__(self, bus: Bus, book: LeaseBook, reporter: Reporter) -> None:
        self._bus = bus
        self._reporter = reporter
        self._news = asyncio.Condition()
        self._current: Lease | None = None
        self._kept: Lease | None = None
        self.book = book
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def current(self) -> Lease:
        """The lease under which work is under way; there is one."""
        if self._current is None:
            raise RuntimeError("no work is under way")
        return self._current

    async def listen(self) -> Sequence[Subscription]:
        me = self.book.instance
        return (
            await self._bus.serve(GRANT_LEASE, self._grant, me),
            await self._bus.serve(REVOKE_LEASE, self._revoke, me),
            await self._bus.serve(PARK_JOB, self._park, me),
            await self._bus.subscribe(GROUP_CALLED, self._call, me),
        )

    def begin(self, lease: Lease) -> None:
        """Work under ``lease`` begins, or goes on under it."""
        self.book.begin(lease)
        self._current = lease
        self._kept = None

    async def end(self, rest: Rest | None) -> None:
        """Nothing is under way any more, but perhaps kept: whoever waits for this worker to be free is answered."""
        self._current = None
        self._kept = None if rest is None else rest.lease
        await self._tell()

    async def let_go(self, job_id: str) -> bool:
        """Whether work on the job, if it is under way here, has come to its end: what was revoked does so soon.

        That is waited for, but not for a step that takes long.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LET_GO_DEADLINE_S), self._news:
                await self._news.wait_for(lambda: not self._works_on(job_id) or not self.book.void(self.current))
        return not self._works_on(job_id)

    async def next(self, rest: Rest | None) -> Lease | None:
        """The lease to begin with, once there is one. None: ``rest``'s time is over."""
        broken = rest.lease if rest is not None and rest.broken else None
        deadline_s = None if rest is None else rest.until_s
        try:
            async with asyncio.timeout_at(deadline_s), self._news:
                while (lease := self.book.waiting(broken)) is None:
                    # What was taken back is not owed any more, but may still be asked for.
                    if rest is None or not rest.owed or self.book.void(rest.lease):
                        self.idle.set()
                    await self._news.wait()
        except TimeoutError:
            return None
        self.idle.clear()
        return lease

    async def _grant(self, lease: Lease) -> Acknowledged:
        """Note the lease; one that joins a group answers only when it is free to come."""
        try:
            self.book.grant(lease)
        except StaleEpoch as stale:
            raise Refusal(self._reporter.failure("stale_epoch", str(stale), retryable=True)) from stale
        if lease.leader == self.book.instance:
            self.idle.clear()
        await self._tell()
        try:
            async with asyncio.timeout(FREE_DEADLINE_S), self._news:
                await self._news.wait_for(lambda: self._can_come(lease))
        except TimeoutError as late:
            raise Refusal(self._reporter.failure("busy", "still at work on another job", retryable=True)) from late
        return Acknowledged()

    def _can_come(self, lease: Lease) -> bool:
        if self._current is None or lease.leader == self.book.instance:
            return True
        return lease.job_id == self._current.job_id and lease.text is None

    def _works_on(self, job_id: str) -> bool:
        return self._current is not None and self._current.job_id == job_id

    async def _revoke(self, request: RevokeLease) -> LeasesRevoked:
        self.book.revoke(request.job_id, request.epoch)
        await self._tell()
        at_hand = self._current or self._kept
        return LeasesRevoked(job_id=at_hand.job_id if at_hand is not None else None)

    async def _park(self, request: ParkJob) -> Acknowledged:
        self.book.park(request.job_id, request.epoch)
        return Acknowledged()

    async def _call(self, called: GroupCalled) -> None:
        self.book.call(called.job_id, called.epoch)
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
