"""Two classic orders at step level, from later work than DDiT: shortest remaining time and earliest deadline first.

Both allocate as DDiT does (B at most, promotion, decoupling), take waiting videos in their own order, and park the
running video that comes last in that order when a waiting one comes before it and no GPU is free. No more are parked
than it takes to give the first waiting one its B GPUs.
"""

from abc import abstractmethod
from typing import ClassVar

from common.policies.video.ddit import Ddit
from common.policies.video.decisions import Decision, GrantLease
from common.policies.video.job_queue import JobQueue
from common.policies.video.placement import Placement
from common.policies.video.rib import Rib
from common.policies.video.state import Job, Phase

# A deadline for those that have none: this many times the seconds the video takes alone on B GPUs.
ASSUMED_SLACK = 5.0


class Preemptive(Ddit):
    """What both share. ``_last`` has the running videos that can be parked, the one to go first at its head."""

    encodes_next: ClassVar[bool] = True

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        super().__init__(first_epoch, rib, placement)
        self._last = JobQueue()
        self._slots_to_come = 0

    @abstractmethod
    def running_rank(self, job: Job, now_s: float) -> float:
        """A number that orders running videos like ``rank`` does and stays the same while they run."""

    @abstractmethod
    def comes_before(self, waiting: Job, running: Job, now_s: float) -> bool:
        """Whether it is worth parking the one for the other."""

    def schedule(self, now_s: float) -> list[Decision]:
        return [*super().schedule(now_s), *self._preempt(now_s)]

    def _preempt(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        first = self.lanes[None].ready.first()
        if first is None:
            return decisions
        wanted = self.best_degree(first)
        while self._slots_to_come < wanted and (victim := self._last.first()) is not None:
            if not self._outranks(first, victim, now_s):
                break
            self._last.discard(victim)
            self._slots_to_come += len(victim.slots)
            decisions.append(self.park_job(victim, f"{first.job_id} comes before it ({self.name})"))
        return decisions

    def _outranks(self, waiting: Job, running: Job, now_s: float) -> bool:
        if waiting.priority != running.priority:
            return waiting.priority > running.priority
        return self.comes_before(waiting, running, now_s)

    def grant_lease(self, job: Job, slots: tuple[int, ...], now_s: float, reason: str) -> GrantLease:
        grant = super().grant_lease(job, slots, now_s, reason)
        self._last.push(job, (job.priority, -self.running_rank(job, now_s)))
        return grant

    def _leave(self, job: Job) -> None:
        if job.phase is Phase.DENOISING:
            self._last.discard(job)
        super()._leave(job)

    def _hold(self, job: Job, slots: tuple[int, ...]) -> None:
        if job.parking:
            self._slots_to_come += len(slots) - len(job.slots)
        super()._hold(job, slots)

    def _unpark(self, job: Job) -> None:
        self._slots_to_come -= len(job.slots)
        super()._unpark(job)
        self._last.push(job, (job.priority, -self.running_rank(job, job.step_at_s)))

    def _end_of_denoising(self, job: Job) -> None:
        if job.parking:
            self._slots_to_come -= len(job.slots)
        super()._end_of_denoising(job)


class ShortestRemainingTimeFirst(Preemptive):
    """Remaining time on B GPUs for those that wait, on the GPUs they have for those that run; in seconds."""

    name = "srtf"

    def rank(self, job: Job) -> float:
        left = job.steps - job.step
        return left * self.rib.step_s(job.kind, self.best_degree(job)) + self.rib.decode_s(job.kind)

    def running_rank(self, job: Job, now_s: float) -> float:
        # The moment it would end at its present degree: as time goes on, the order of these moments stays.
        left = (job.steps - job.step) * self.rib.step_s(job.kind, len(job.lease))
        return now_s + left + self.rib.decode_s(job.kind)

    def comes_before(self, waiting: Job, running: Job, now_s: float) -> bool:
        # A step of margin: that is what parking may cost.
        margin = self.rib.step_s(running.kind, len(running.lease))
        return self.rank(waiting) + margin < self.running_rank(running, running.step_at_s) - now_s

    def _grow(self, job: Job, more: tuple[int, ...], optimal: int, why: str) -> GrantLease:
        grant = super()._grow(job, more, optimal, why)
        self._last.push(job, (job.priority, -self.running_rank(job, job.step_at_s)))
        return grant


class EarliestDeadlineFirst(Preemptive):
    """By the user's deadline; without one, by one in proportion to the time the video takes alone."""

    name = "edf"

    def rank(self, job: Job) -> float:
        if job.deadline_s is not None:
            return job.deadline_s
        alone_s = job.steps * self.rib.step_s(job.kind, self.best_degree(job)) + self.rib.decode_s(job.kind)
        return job.arrival_s + ASSUMED_SLACK * alone_s

    def running_rank(self, job: Job, now_s: float) -> float:
        return self.rank(job)

    def comes_before(self, waiting: Job, running: Job, now_s: float) -> bool:
        return self.rank(waiting) < self.rank(running)
