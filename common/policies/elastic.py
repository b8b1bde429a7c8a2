"""Our own policy: exact remaining work, a price for GPUs, and leases that shrink and park as well as grow.

What DDiT leaves unused is known here: how much work every video has left, what one more GPU would save it, and how many
others pay for that. Four rules follow.

* **Order.** Videos are ordered by arrival plus weighted remaining work (in seconds on one GPU): a shorter one overtakes
  a longer one only if it came not much later. The weight grows with the backlog that a video finds: nearly first come,
  first served while queues are short, which is best for the longest latencies, and shortest first as they grow, which
  is what the mean then needs. No video starves: its place is fixed when it comes. A deadline counts where it is more
  urgent.
* **Price.** A GPU-second costs as many seconds as there are videos that it delays, over the number of GPUs: those that
  wait, and, while GPUs are short, those expected to come until the work at hand is done (arrival rate x backlog /
  (1 - load)). A group is doubled while that saves the video more than the additional GPU-seconds cost: wide groups
  while GPUs are plenty, one GPU a video at and past saturation.
* **Nothing idles.** GPUs that nobody wants at this price go where they save most, even beyond DDiT's optimum B; the
  next newcomer has them back at a step boundary.
* **Taking.** If a video waits and no GPU is free, one group is halved: one wider than the price allows, else that of
  the video that comes last in the order, if it comes after the one that waits; one GPU alone is parked. A change must
  be worth more than the step it may cost.

Past saturation, of the orders tried, first come, first served had the lowest 99th percentile and shortest first the
lowest mean; this policy lies between them (``OVERTAKING`` and the weights say where). Its goal, no worse than any other
policy in both, is reached by no policy yet: see ``docs/measurements.md``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from common.policies.decisions import Decision, GrantLease, ParkJob
from common.policies.events import JobArrived
from common.policies.job_queue import JobQueue, Rank
from common.policies.placement import Placement, bits
from common.policies.policy import Policy
from common.policies.rib import NOISE, Rib, VideoKind, video_kind
from common.policies.state import Job, Phase

# What a second of remaining work weighs in the order against a second of waiting: this, times the backlog (in mean
# videos) when the video came, within the limits below.
OVERTAKING = 0.4
LEAST_WEIGHT = 0.3
MOST_WEIGHT = 1.0
# Seconds of memory of the arrival rate.
MEMORY_S = 300.0
# Of the arrivals expected during the backlog, the part that a GPU-second spent now delays.
DELAYED_PART = 0.3
# How much a video that waits already counts against one that is expected.
WAITING_WEIGHT = 3.0
# From this price on, waiting videos come before the growth of running ones (brief, section 8.3).
WAITING_FIRST_PRICE = 1.0
# Load is taken to be at most this, so that the price stays finite past saturation.
MOST_LOAD = 0.98
# Steps (of the video that would be parked or halved) by which the waiting one must come before it.
MARGIN_STEPS = 4.0


class ArrivalRate:
    """Videos a second, and GPU-seconds of work a second, as they came of late: an exponentially fading average."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._began_s: float | None = None
        self._last_s = 0.0
        self._videos = 0.0
        self._work = 0.0

    def arrived(self, work_s: float, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._last_s = now_s
        fade = math.exp((self._last_s - now_s) / self._memory_s)
        self._last_s = now_s
        self._videos = self._videos * fade + 1.0
        self._work = self._work * fade + work_s

    def per_second(self, now_s: float) -> tuple[float, float]:
        """Videos and work a second. Little is known at the start: a fifth of the memory counts as seen."""
        if self._began_s is None:
            return 0.0, 0.0
        seen = max(0.2, 1.0 - math.exp((self._began_s - now_s) / self._memory_s))
        scale = math.exp((self._last_s - now_s) / self._memory_s) / (self._memory_s * seen)
        return self._videos * scale, self._work * scale


@dataclass(slots=True)
class _Candidate:
    """A running video that could have more GPUs of its server."""

    job: Job
    degree: int
    wanted: int
    left: float
    saved_s_per_gpu: float


class Elastic(Policy):
    """See the module's head. Times are the RIB's; where a video stands is computed from its last known step."""

    name = "elastic"
    encodes_next: ClassVar[bool] = True

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        super().__init__(first_epoch, rib, placement)
        self._rate = ArrivalRate(MEMORY_S)
        self._waiting_work = 0.0
        self._running_work = 0.0
        self._work_of: dict[str, float] = {}
        self._weight_of: dict[str, float] = {}
        # Slots that will be free at the next step boundary of their job.
        self._to_come: dict[str, int] = {}
        self._slots_to_come = 0
        # Running videos whose lease may be taken from, the last in the order at the head.
        self._last = JobQueue()
        # The same with two GPUs or more, by kind and degree; and by server, all that run.
        self._wide: dict[tuple[VideoKind, int], dict[str, Job]] = {}
        self._wide_place: dict[str, dict[str, Job]] = {}
        self._on_server: dict[int, dict[str, Job]] = {}

    def schedule(self, now_s: float) -> list[Decision]:
        placement = self.state.placement
        ready = self.lanes[None].ready
        decisions: list[Decision] = []
        if ready:
            price = self._price(now_s, len(ready) + self._to_encode)
            if price < WAITING_FIRST_PRICE and placement.free:
                self._grow_all(now_s, price, decisions, ahead_of=ready.first_rank())
            self._admit(now_s, decisions)
            waiting = ready.first()
            if waiting is not None and self._slots_to_come < len(ready):
                self._take(waiting, now_s, price, decisions)
        if placement.free and placement.freed_servers and not ready:
            self._grow_all(now_s, 0.0, decisions)
            placement.freed_servers = 0
        return decisions

    def rank(self, job: Job) -> float:
        return self._rank(job, float(job.steps - job.step))

    def _rank(self, job: Job, steps_left: float) -> float:
        profile = self.rib.profile(job.kind)
        weight = self._weight_of[job.job_id]
        rank = job.arrival_s + weight * (steps_left * profile.step_s[1] + profile.decode_s)
        if job.deadline_s is None:
            return rank
        # The latest moment to start on B GPUs and be in time.
        alone_s = steps_left * profile.step_s[self.best_degree(job)] + profile.decode_s
        return min(rank, job.deadline_s - alone_s)

    # --- the price, and what it allows ----------------------------------------------------------------------------

    def _price(self, now_s: float, waiting: int) -> float:
        """Seconds of delay, summed over all videos, that a GPU-second spent now causes while so many others wait."""
        gpus = max(1, len(self.state.slots))
        delayed = WAITING_WEIGHT * waiting
        if delayed or not self.state.placement.free:
            videos_per_s, work_per_s = self._rate.per_second(now_s)
            load = min(MOST_LOAD, work_per_s / gpus)
            delayed += DELAYED_PART * videos_per_s * self._backlog_s() / (1.0 - load)
        return delayed / gpus

    def _backlog_s(self) -> float:
        """Seconds that the work at hand takes on all GPUs; those that run are half done, taken together."""
        return (self._waiting_work + 0.5 * self._running_work) / max(1, len(self.state.slots))

    def _degree(self, kind: VideoKind, price: float) -> int:
        """The degree up to which every doubling saves more than it costs."""
        step_s = self.rib.profile(kind).step_s
        most = min(self.state.placement.largest_server, self.rib.degrees[-1])
        degree = 1
        while 2 * degree <= most:
            narrow, wide = step_s[degree], step_s[2 * degree]
            if narrow - wide <= max(NOISE * narrow, price * degree * (2 * wide - narrow)):
                break
            degree *= 2
        return degree

    def _steps_left(self, job: Job, now_s: float) -> float:
        """Steps that the running job has left, the one under way in part."""
        left = job.steps - job.step - (now_s - job.step_at_s) / self.rib.step_s(job.kind, len(job.active))
        return max(0.0, left)

    # --- giving ---------------------------------------------------------------------------------------------------

    def _admit(self, now_s: float, decisions: list[Decision]) -> None:
        """Waiting videos in their order, each on as many free GPUs as the price allows."""
        placement = self.state.placement
        ready = self.lanes[None].ready
        while placement.free and (job := ready.first()) is not None:
            price = self._price(now_s, len(ready) + self._to_encode - 1)
            wanted = self._degree(job.kind, price)
            slots = placement.block(placement.largest(wanted))
            if slots is None:
                return
            reason = f"first in the order; {len(slots)} of {wanted} GPUs at a price of {price:.2f}"
            decisions.append(self.grant_lease(job, slots, now_s, reason))

    def _grow_all(self, now_s: float, price: float, decisions: list[Decision], ahead_of: Rank | None = None) -> None:
        """Free GPUs of the servers where some became free, to running videos (those before a rank, if one is given)."""
        placement = self.state.placement
        for index in bits(placement.freed_servers):
            if placement.servers[index].free and self._on_server.get(index):
                self._grow_in(index, now_s, price, decisions, ahead_of)

    def _grow_in(
        self, server: int, now_s: float, price: float, decisions: list[Decision], ahead_of: Rank | None
    ) -> None:
        """Double the group that saves most for each GPU, until nothing more is to be had."""
        placement = self.state.placement
        free = placement.servers[server].free.bit_count()
        candidates = []
        for job in self._on_server[server].values():
            degree = len(job.lease)
            if degree > free or job.parking or job.leaving:
                continue
            wanted = self._degree(job.kind, price)
            left = self._steps_left(job, now_s) - 1.0
            if wanted <= degree:
                continue
            if ahead_of is not None and (-job.priority, self._rank(job, left)) > ahead_of:
                continue
            saved_s = self._saved_by_doubling(job, degree, left)
            if saved_s > 0.0:
                candidates.append(_Candidate(job, degree, wanted, left, saved_s / degree))
        grown: dict[str, tuple[Job, int]] = {}
        while free and candidates:
            best = max(candidates, key=lambda candidate: (candidate.saved_s_per_gpu, candidate.job.job_id))
            if best.degree > free:
                candidates.remove(best)
                continue
            free -= best.degree
            best.degree *= 2
            grown[best.job.job_id] = (best.job, best.degree)
            best.saved_s_per_gpu = self._saved_by_doubling(best.job, best.degree, best.left) / best.degree
            if best.degree >= best.wanted or best.saved_s_per_gpu <= 0.0:
                candidates.remove(best)
        for job, degree in grown.values():
            more = placement.growth(job.lease, degree)
            if more:
                slots = (job.lease[0], *sorted(job.lease[1:] + more))
                why = f"{len(more)} more GPUs save it most" if price else "GPUs would idle, and they save it most"
                decisions.append(self.change_lease(job, slots, f"{why}: {len(job.lease)} -> {len(slots)}"))

    def _saved_by_doubling(self, job: Job, degree: int, left: float) -> float:
        """Seconds; 0 where that is less than noise or less than a step, which a change may cost."""
        step_s = self.rib.profile(job.kind).step_s
        if 2 * degree not in step_s:
            return 0.0
        narrow, wide = step_s[degree], step_s[2 * degree]
        saved_s = left * (narrow - wide)
        return saved_s if narrow - wide > NOISE * narrow and saved_s > narrow else 0.0

    # --- taking ---------------------------------------------------------------------------------------------------

    def _take(self, waiting: Job, now_s: float, price: float, decisions: list[Decision]) -> None:
        """Have one running video give up GPUs for the first waiting one."""
        victim = self._too_wide(waiting, now_s, price)
        if victim is not None:
            self._halve(victim, f"wider than pays off at a price of {price:.2f}, and {waiting.job_id} waits", decisions)
            return
        victim = self._last_in_order(now_s)
        if victim is None or victim.priority > waiting.priority:
            return
        left = self._steps_left(victim, now_s) - 1.0
        if left <= 1.0:
            return
        rank = self._rank(victim, left) - MARGIN_STEPS * self.rib.step_s(victim.kind, 1)
        if victim.priority == waiting.priority and rank <= self.rank(waiting):
            return
        why = f"{waiting.job_id} comes before it and no GPU is free"
        if len(victim.lease) > 1:
            self._halve(victim, why, decisions)
            return
        decisions.append(self.park_job(victim, why))

    def _too_wide(self, waiting: Job, now_s: float, price: float) -> Job | None:
        """A group wider than the price allows, of no higher priority, with enough left to do for a change to pay."""
        for (kind, degree), jobs in self._wide.items():
            if jobs and degree > self._degree(kind, price):
                for job in jobs.values():
                    if job.priority <= waiting.priority and self._steps_left(job, now_s) > 2.0:
                        return job
        return None

    def _last_in_order(self, now_s: float) -> Job | None:
        """The running video that comes last. Ranks fall while videos run; they are brought up to date at the head."""
        for _ in range(4):
            job = self._last.first()
            if job is None:
                return None
            rank = (job.priority, -self._rank(job, self._steps_left(job, now_s)))
            before = self._last.first_rank()
            if before is not None and rank <= (before[0], before[1] + 1.0):
                return job
            self._last.push(job, rank)
        return self._last.first()

    def _halve(self, job: Job, why: str, decisions: list[Decision]) -> None:
        """Go on with half the group: the aligned half with the master, where the group is aligned."""
        size = len(job.lease) // 2
        server = self.state.placement.server_of[job.lease[0]]
        block = (job.lease[0] - server.first) // size
        stay = [number for number in job.lease if (number - server.first) // size == block]
        slots = tuple(stay) if len(stay) == size else job.lease[:size]
        decisions.append(self.change_lease(job, slots, f"{why}: {2 * size} -> {size} GPUs"))

    # --- the books ------------------------------------------------------------------------------------------------

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
        self._not_to_be_taken_from(job, 0)
        self._last.push(job, (job.priority, -self._rank(job, float(job.steps - job.step))))
        if len(job.lease) > 1:
            where = self._wide.setdefault((job.kind, len(job.lease)), {})
            where[job.job_id] = job
            self._wide_place[job.job_id] = where

    def _not_to_be_taken_from(self, job: Job, slots_to_come: int) -> None:
        """It is changing, or ends; so many of its slots are to come free with that."""
        self._last.discard(job)
        where = self._wide_place.pop(job.job_id, None)
        if where is not None:
            del where[job.job_id]
        self._slots_to_come += slots_to_come - self._to_come.pop(job.job_id, 0)
        if slots_to_come:
            self._to_come[job.job_id] = slots_to_come

    def _enter(self, job: Job) -> None:
        super()._enter(job)
        if job.phase in (Phase.DENOISED, Phase.DECODING):
            return
        profile = self.rib.profile(job.kind)
        work_s = (job.steps - job.step) * profile.step_s[1] + profile.decode_s
        self._work_of[job.job_id] = work_s
        if job.phase is Phase.DENOISING:
            self._running_work += work_s
            server = self.state.placement.server_of[job.slots[0]].index
            self._on_server.setdefault(server, {})[job.job_id] = job
        else:
            self._waiting_work += work_s

    def _leave(self, job: Job) -> None:
        super()._leave(job)
        work_s = self._work_of.pop(job.job_id, 0.0)
        if job.phase is Phase.DENOISING:
            self._running_work -= work_s
            del self._on_server[self.state.placement.server_of[job.lease[0]].index][job.job_id]
            self._not_to_be_taken_from(job, 0)
        else:
            self._waiting_work -= work_s

    def _arrived(self, event: JobArrived, now_s: float) -> list[Decision] | None:
        if event.job_id not in self.state.jobs:
            profile = self.rib.profile(video_kind(event.width, event.height, event.frames))
            self._rate.arrived((event.steps - event.step) * profile.step_s[1] + profile.decode_s, now_s)
            videos_per_s, work_per_s = self._rate.per_second(now_s)
            weight = OVERTAKING * self._backlog_s() * videos_per_s / max(work_per_s, 1e-9)
            self._weight_of[event.job_id] = min(max(weight, LEAST_WEIGHT), MOST_WEIGHT)
        return super()._arrived(event, now_s)

    def _remove(self, job: Job) -> None:
        super()._remove(job)
        del self._weight_of[job.job_id]
