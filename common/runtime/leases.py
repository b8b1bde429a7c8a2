"""A worker's hold on what it was granted: one piece of work at a time, void as soon as it is revoked or overtaken."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import structlog

from common.bus.errors import BusError, Refusal
from common.bus.port import Bus
from common.messages.base import Message
from common.messages.failures import Acknowledged, Failure, Stage
from common.messages.subjects import PHASE_FAILED, RequestSubject
from common.messages.video import PhaseFailed
from common.policies.fence import Fence, StaleEpoch

log = structlog.get_logger()

REPORT_DEADLINE_S = 2.0
REPORT_PAUSE_S = 0.2


class Granted(Protocol):
    """Work that was granted under an epoch."""

    @property
    def job_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...


Work = TypeVar("Work", bound=Granted)
Report = TypeVar("Report", bound=Message)


class LeaseLost(Exception):
    """The work was revoked, or newer work has taken its place."""


class Reporter:
    """Tells the scheduler what came of granted work."""

    def __init__(self, bus: Bus, stage: Stage, instance: str) -> None:
        self._bus = bus
        self._stage = stage
        self._instance = instance

    async def report(
        self, void: Callable[[], bool], subject: RequestSubject[Report, Acknowledged], message: Report
    ) -> None:
        """Tell it again and again until it has heard.

        Raises:
            LeaseLost: the work became void meanwhile; nobody waits for the report.
        """
        while True:
            if void():
                raise LeaseLost
            try:
                await self._bus.request(subject, message, deadline_s=REPORT_DEADLINE_S)
                return
            except BusError as error:
                log.warning("report not heard, telling again", report=type(message).__name__, reason=str(error))
            await asyncio.sleep(REPORT_PAUSE_S)

    async def report_failure(
        self, void: Callable[[], bool], work: Granted, code: str, message: str, *, retryable: bool
    ) -> None:
        """Tell it that this worker cannot do the work."""
        failure = self.failure(code, message, retryable)
        report = PhaseFailed(job_id=work.job_id, epoch=work.epoch, instance=self._instance, failure=failure)
        await self.report(void, PHASE_FAILED, report)

    def failure(self, code: str, message: str, retryable: bool) -> Failure:
        return Failure(stage=self._stage, code=code, message=message, retryable=retryable)


class LeaseHolder(Generic[Work]):
    """Takes grants, works them off one after the other with ``work_off``, and reports what comes of them.

    ``work_off`` calls ``check`` wherever it can stop (between two steps, between two chunks).
    """

    def __init__(self, bus: Bus, stage: Stage, instance: str, work_off: Callable[[Work], Awaitable[None]]) -> None:
        self._reporter = Reporter(bus, stage, instance)
        self._work_off = work_off
        self._fence = Fence()
        self._work: Work | None = None
        self._last: Work | None = None
        self._asked = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    async def grant(self, work: Work) -> Acknowledged:
        """Take work, unless something newer has been seen. It replaces older work where that can stop.

        Work that comes again, its answer having been lost, changes nothing.
        """
        if work == self._last:
            return Acknowledged()
        try:
            self._fence.admit(work.job_id, work.epoch)
        except StaleEpoch as stale:
            raise Refusal(self._reporter.failure("stale_epoch", str(stale), retryable=True)) from stale
        self._work = self._last = work
        self.idle.clear()
        self._asked.set()
        return Acknowledged()

    def revoke(self, job_id: str | None, epoch: int) -> None:
        """Make grants of the job (None: of any) up to ``epoch`` void."""
        self._fence.revoke(job_id, epoch)

    def check(self, work: Work) -> None:
        """Raises LeaseLost if the work is void."""
        if self._void(work):
            raise LeaseLost

    async def run(self) -> None:
        """Work off one grant after the other; runs until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            work = self._work
            if work is None:
                continue
            try:
                await self._work_off(work)
            except LeaseLost:
                log.info("work let go", job=work.job_id, epoch=work.epoch)
            if self._work is work:
                self._work = None
                self.idle.set()

    async def report(self, work: Work, subject: RequestSubject[Report, Acknowledged], message: Report) -> None:
        """See ``Reporter.report``."""
        await self._reporter.report(lambda: self._void(work), subject, message)

    async def report_failure(self, work: Work, code: str, message: str, *, retryable: bool) -> None:
        """See ``Reporter.report_failure``."""
        await self._reporter.report_failure(lambda: self._void(work), work, code, message, retryable=retryable)

    def _void(self, work: Work) -> bool:
        return not self._fence.holds(work.job_id, work.epoch)
