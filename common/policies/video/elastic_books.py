"""What the policy ``elastic`` keeps books of: work, who is pressing, whom GPUs may be taken from; and its moves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappush

from common.policies.video.decisions import Decision, GrantLease, ParkJob
from common.policies.video.events import WorkerJoined
from common.policies.video.job_queue import JobQueue
from common.policies.video.placement import Placement
from common.policies.video.policy import Policy
from common.policies.video.rib import NOISE, Rib, VideoKind
from common.policies.video.state import Job, Phase

# Looking a member of an enumeration up costs more than a name.
_DENOISING = Phase.DENOISING
_DENOISED = frozenset((Phase.DENOISED, Phase.DECODING))
_BEGINS_TO_WAIT = frozenset((Phase.WAITING, Phase.PARKED))


@dataclass(slots=True)
class _Candidate:
    """A running video that could have more GPUs of its server."""

    job: Job
    degree: int
    wanted: int
    left: float
    saved_s_per_gpu: float


class ElasticBooks(Policy):
    """Leaves open who gets what while videos wait. Work is in seconds on one GPU."""

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        super().__init__(first_epoch, rib, placement)
        self._gpus = 1
        self._waiting_work = 0.0
        self._running_work = 0.0
        self._work_of: dict[str, float] = {}
        # Latest starts of those that are pressing, the work of those of them that wait, and who was passed over.
        self._pressing: dict[str, float] = {}
        self._pressing_work = 0.0
        self._passed_over: set[str] = set()
        # Those that wait and are not pressing, by kind, whether they have a deadline and whether they were passed over;
        # first due first.
        self._in_time: dict[tuple[VideoKind, bool, bool], list[tuple[float, str, Job]]] = {}
        self._price_limits: dict[VideoKind, tuple[float, ...]] = {}
        # Slots that will be free at the next step boundary of their job.
        self._to_come: dict[str, int] = {}
        self._slots_to_come = 0
        # Running videos whose lease may be taken from, the one with the most work left at the head.
        self._last = JobQueue()
        # The same with two GPUs or more, by kind and degree; and by server, all that run.
        self._wide: dict[tuple[VideoKind, int], dict[str, Job]] = {}
        self._wide_place: dict[str, dict[str, Job]] = {}
        self._on_server: dict[int, dict[str, Job]] = {}

    def _work_s(self, job: Job, left: float) -> float:
        """GPU-seconds on one GPU."""
        profile = self.rib.profile(job.kind)
        return left * profile.step_s[1] + profile.decode_s

    def _steps_left(self, job: Job, now_s: float) -> float:
        """Steps that the running job has left, the one under way in part."""
        left = job.steps - job.step - (now_s - job.step_at_s) / self.rib.profile(job.kind).step_s[len(job.active)]
        return left if left > 0.0 else 0.0

    def _most_left(self, now_s: float) -> Job | None:
        """The running video with the most work left. Work falls while videos run; it is brought up to date here."""
        for _ in range(4):
            job = self._last.first()
            if job is None:
                return None
            rank = (job.priority, -self._work_s(job, self._steps_left(job, now_s)))
            before = self._last.first_rank()
            if before is not None and rank <= (before[0], before[1] + 1.0):
                return job
            self._last.push(job, rank)
        return self._last.first()

    def _take_from(self, job: Job, why: str, decisions: list[Decision]) -> int:
        """Halve its group (the aligned half with the master stays, where it is aligned), or park it; slots to come."""
        size = len(job.lease) // 2
        if size == 0:
            decisions.append(self.park_job(job, why))
            return 1
        server = self.state.placement.server_of[job.lease[0]]
        block = (job.lease[0] - server.first) // size
        stay = [number for number in job.lease if (number - server.first) // size == block]
        slots = tuple(stay) if len(stay) == size else job.lease[:size]
        decisions.append(self.change_lease(job, slots, f"{why}: {2 * size} -> {size} GPUs"))
        return size

    def _degree(self, kind: VideoKind, price: float) -> int:
        """The degree up to which every doubling saves more than it costs."""
        limits = self._price_limits.get(kind)
        if limits is None:
            doublings = max(1, self.state.placement.largest_server).bit_length() - 1
            limits = self._price_limits[kind] = price_limits(self.rib.profile(kind).step_s)[:doublings]
        degree = 1
        for limit in limits:
            if price >= limit:
                break
            degree *= 2
        return degree

    def _saved_by_doubling(self, job: Job, degree: int, left: float) -> float:
        """Seconds; 0 where that is less than noise or less than a step, which a change may cost."""
        step_s = self.rib.profile(job.kind).step_s
        if 2 * degree not in step_s:
            return 0.0
        narrow, wide = step_s[degree], step_s[2 * degree]
        saved_s = left * (narrow - wide)
        return saved_s if narrow - wide > NOISE * narrow and saved_s > narrow else 0.0

    def _fill(self, server: int, now_s: float, decisions: list[Decision]) -> None:
        """Nobody waits: double the group of the server that saves most for each GPU, for as long as one can be."""
        placement = self.state.placement
        free = placement.servers[server].free.bit_count()
        candidates = []
        for job in self._on_server[server].values():
            degree = len(job.lease)
            if degree > free or job.parking or job.leaving:
                continue
            left = self._steps_left(job, now_s) - 1.0
            saved_s = self._saved_by_doubling(job, degree, left)
            if saved_s > 0.0:
                candidates.append(_Candidate(job, degree, self._degree(job.kind, 0.0), left, saved_s / degree))
        grown: dict[str, _Candidate] = {}
        while free and candidates:
            best = max(candidates, key=lambda candidate: (candidate.saved_s_per_gpu, candidate.job.job_id))
            if best.degree > free or best.degree >= best.wanted or best.saved_s_per_gpu <= 0.0:
                candidates.remove(best)
                continue
            free -= best.degree
            best.degree *= 2
            grown[best.job.job_id] = best
            best.saved_s_per_gpu = self._saved_by_doubling(best.job, best.degree, best.left) / best.degree
        for candidate in grown.values():
            self._grow(candidate.job, candidate.degree, "GPUs would idle, and they save it most", decisions)

    def _grow(self, job: Job, degree: int, why: str, decisions: list[Decision]) -> None:
        more = self.state.placement.growth(job.lease, degree)
        if more:
            slots = (job.lease[0], *sorted(job.lease[1:] + more))
            decisions.append(self.change_lease(job, slots, f"{why}: {len(job.lease)} -> {len(slots)} GPUs"))

    # --- kept up to date ------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined, now_s: float) -> list[Decision] | None:
        self._price_limits.clear()
        decisions = super()._worker_joined(event, now_s)
        self._gpus = max(1, len(self.state.slots))
        return decisions

    def grant_lease(self, job: Job, slots: tuple[int, ...], now_s: float, reason: str) -> GrantLease:
        grant = super().grant_lease(job, slots, now_s, reason)
        self._may_be_taken_from(job)
        return grant

    def change_lease(self, job: Job, slots: tuple[int, ...], reason: str) -> GrantLease:
        grant = super().change_lease(job, slots, reason)
        self._not_to_be_taken_from(job, len(job.slots) - len(slots))
        return grant

    def park_job(self, job: Job, reason: str) -> ParkJob:
        park = super().park_job(job, reason)
        self._not_to_be_taken_from(job, len(job.slots))
        return park

    def _settle(self, job: Job) -> None:
        super()._settle(job)
        if job.parking:
            self._not_to_be_taken_from(job, len(job.slots))
        else:
            self._may_be_taken_from(job)

    def _go_on_without(self, job: Job, lost: str, now_s: float) -> list[Decision]:
        decisions = super()._go_on_without(job, lost, now_s)
        if decisions:
            self._not_to_be_taken_from(job, len(job.slots) - len(job.lease))
        return decisions

    def _may_be_taken_from(self, job: Job) -> None:
        """Its newest lease is in effect, and it is not on its way out."""
        self._settle_slots(job, 0)
        self._last.push(job, (job.priority, -self._work_s(job, job.steps - job.step)))
        if len(job.lease) > 1:
            where = self._wide.setdefault((job.kind, len(job.lease)), {})
            where[job.job_id] = job
            self._wide_place[job.job_id] = where

    def _not_to_be_taken_from(self, job: Job, slots_to_come: int) -> None:
        """It is changing, or ends; so many of its slots are to come free with that."""
        self._last.discard(job)
        self._settle_slots(job, slots_to_come)

    def _settle_slots(self, job: Job, slots_to_come: int) -> None:
        """It is no longer among the wide groups, and what was to come of it is out of date."""
        where = self._wide_place.pop(job.job_id, None)
        if where is not None:
            del where[job.job_id]
        self._slots_to_come += slots_to_come - self._to_come.pop(job.job_id, 0)
        if slots_to_come:
            self._to_come[job.job_id] = slots_to_come

    def _to_watch(self, job: Job) -> None:
        """Have it become pressing in time."""
        key = (job.kind, job.deadline_s is not None, job.job_id in self._passed_over)
        due_s = job.arrival_s if job.deadline_s is None else job.deadline_s
        heappush(self._in_time.setdefault(key, []), (due_s, job.job_id, job))

    def _enter(self, job: Job) -> None:
        phase = job.phase
        if phase in _DENOISED:
            return
        work_s = self._work_of[job.job_id] = self._work_s(job, job.steps - job.step)
        super()._enter(job)
        if phase is _DENOISING:
            self._running_work += work_s
            server = self.state.placement.server_of[job.slots[0]].index
            self._on_server.setdefault(server, {})[job.job_id] = job
            return
        self._waiting_work += work_s
        if job.job_id in self._pressing:
            self._pressing_work += work_s
        elif phase in _BEGINS_TO_WAIT:
            self._to_watch(job)

    def _leave(self, job: Job) -> None:
        phase = job.phase
        if phase in _DENOISED:
            return
        super()._leave(job)
        work_s = self._work_of.pop(job.job_id)
        if phase is _DENOISING:
            self._running_work -= work_s
            del self._on_server[self.state.placement.server_of[job.lease[0]].index][job.job_id]
            self._not_to_be_taken_from(job, 0)
            self._pressing.pop(job.job_id, None)
            return
        self._waiting_work -= work_s
        if job.job_id in self._pressing:
            self._pressing_work -= work_s

    def _remove(self, job: Job) -> None:
        super()._remove(job)
        self._pressing.pop(job.job_id, None)
        self._passed_over.discard(job.job_id)


def price_limits(step_s: Mapping[int, float]) -> tuple[float, ...]:
    """Below which price (seconds a GPU-second) going from 1 to 2 GPUs pays off, from 2 to 4, and so on.

    A doubling saves ``narrow - wide`` seconds a step and costs ``2 * wide - narrow`` for each GPU there was. The list
    ends before the first doubling that saves no more than noise.
    """
    limits = []
    degree = 1
    while 2 * degree in step_s:
        saved_s = step_s[degree] - step_s[2 * degree]
        if saved_s <= NOISE * step_s[degree]:
            break
        more_s = degree * (step_s[2 * degree] - saved_s)
        limits.append(saved_s / more_s if more_s > 0.0 else math.inf)
        degree *= 2
    return tuple(limits)
