"""Our own policy: shortest first for as long as nobody gets late by it, and GPUs for those that do.

What DDiT leaves unused is known here: how much work every video has left, what one more GPU would save it, and how late
it would be under a plain discipline. Six rules follow.

* **Due.** A video is due when first come, first served would have had nearly all of late done: its arrival plus the
  99th percentile of that discipline's latencies (``ReferenceTail``), a little less. A deadline of its own takes the
  place of that.
* **Order.** Shortest remaining work first, which is best for the mean, until a video's latest start comes: the moment
  from which it just ends when due, less the time that those before it will take. Then it is *pressing* and goes before
  all that are not; pressing ones go by their latest start, so that long ones start sooner. No video starves: it will be
  pressing, and nothing passes it for ever.
* **One in a hundred may be late.** A 99th percentile does not see it, and in overload a long video that waits makes
  room for many. Of every hundred that came, one of the longest is passed over when it would be pressing; it is after
  ``PATIENCE`` times as long. Nobody is before a hundred have come.
* **Price.** A GPU-second costs as many seconds as there are videos that it delays, over the number of GPUs: those that
  wait, and, while GPUs are short, those expected to come until the work at hand is done (arrival rate x backlog /
  (1 - load)). A group is doubled while that saves the video more than the additional GPU-seconds cost: wide groups
  while GPUs are plenty, one GPU a video at and past saturation. GPUs that nobody wants go where they save most.
* **Late ones.** A running video that would end after it is due counts ``URGENT`` times in that price. Freed GPUs go to
  the latest of them before anybody else, and where they do not suffice to double its group, videos that are in time
  are halved or parked for it; if nobody waits, also on a server that has none free while another has. Where GPUs are
  so short that width is waste (``BUSY_PRICE``), all of this is left out.
* **Taking.** If a video waits and no GPU is free, one group is halved: one wider than the price allows, else that of
  the video with the most work left, if the one that waits is pressing or shorter; one GPU alone is parked. Never from
  a video that is late or would be by it. A change must be worth more than the step it may cost.

How near this comes to its goal, no worse than any other policy in mean and p99, is in ``docs/measurements.md``.
"""

import math
from heapq import heappop
from typing import ClassVar

from common.policies.video.decisions import Decision
from common.policies.video.demand import ArrivalRate, ReferenceTail
from common.policies.video.elastic_books import ElasticBooks
from common.policies.video.events import JobArrived
from common.policies.video.job_queue import Rank
from common.policies.video.placement import Placement, bits
from common.policies.video.rib import NOISE, Rib
from common.policies.video.state import Job, Phase

# The part of all videos that may be late, and how many of the last ones the reference's tail is taken from.
LATE_SHARE = 0.01
WINDOW = 400
# How many times its own time a video takes in the reference, and the part of the reference's tail that videos have.
OWN_TIMES = 1.2
DUE_PART = 0.97
# How much of the work of those that are pressing already counts as being before one that is about to be.
BEFORE_PART = 0.7
# Passed over, a video is due after so many times as long.
PATIENCE = 5.0
# How much more a second counts for a video that is late.
URGENT = 2.0
# From this price on, GPUs are too short for late videos to be made wider at the cost of others.
BUSY_PRICE = 4.0
# Seconds of memory of the arrival rate.
MEMORY_S = 300.0
# Of the arrivals expected during the backlog, the part that a GPU-second spent now delays.
DELAYED_PART = 0.6
# How much a video that waits already counts against one that is expected.
WAITING_WEIGHT = 3.0
# Load is taken to be at most this, so that the price stays finite past saturation.
MOST_LOAD = 0.98
# Steps on one GPU by which the waiting video must be shorter than the one that is halved or parked for it.
MARGIN_STEPS = 4.0

_WAITS = frozenset((Phase.WAITING, Phase.ENCODING, Phase.ENCODED, Phase.PARKED))


class Elastic(ElasticBooks):
    """See the module's head. Times are the RIB's; where a video stands is computed from its last known step."""

    name = "elastic"
    encodes_next: ClassVar[bool] = True

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        super().__init__(first_epoch, rib, placement)
        self._rate = ArrivalRate(MEMORY_S)
        self._tail = ReferenceTail(LATE_SHARE, WINDOW)
        self._price = 0.0
        self._expected = 0.0
        # How many more may be passed over.
        self._may_be_late = 0.0

    def schedule(self, now_s: float) -> list[Decision]:
        placement = self.state.placement
        ready = self.lanes[None].ready
        decisions: list[Decision] = []
        waiting = len(ready)
        if waiting or self._to_encode:
            self._expected = self._expected_to_wait(now_s)
            self._price = self._price_of(waiting + self._to_encode)
            self._press(now_s)
        if waiting:
            kept = self._help_late(now_s, decisions) if placement.free and self._price < BUSY_PRICE else 0
            self._admit(now_s, kept, decisions)
            waiting = len(ready)
            if self._slots_to_come < waiting and (first := ready.first()) is not None:
                self._take(first, now_s, decisions)
        if placement.free and placement.freed_servers and not waiting:
            self._price = 0.0
            kept = self._help_late(now_s, decisions, even_where_none_is_free=True)
            for index in bits(placement.freed_servers & ~kept):
                if placement.servers[index].free and self._on_server.get(index):
                    self._fill(index, now_s, decisions)
            placement.freed_servers = 0
        return decisions

    # --- the order ------------------------------------------------------------------------------------------------

    def rank(self, job: Job) -> float:
        start_s = self._pressing.get(job.job_id)
        return self._work_of[job.job_id] if start_s is None else start_s

    def _queue_rank(self, job: Job) -> Rank:
        return (-job.priority, float(job.job_id not in self._pressing), self.rank(job))

    def _press(self, now_s: float) -> None:
        """Whose latest start has come is pressing from now on, or passed over."""
        jobs, pressing = self.state.jobs, self._pressing
        for queue in list(self._in_time.values()):
            while queue:
                _, job_id, job = queue[0]
                if jobs.get(job_id) is not job or job_id in pressing or job.phase not in _WAITS:
                    heappop(queue)
                    continue
                soon_s = now_s + BEFORE_PART * self._pressing_work / self._gpus
                # On one GPU it takes longest; that is known already.
                if self._due_s(job) - self._work_of[job_id] > soon_s:
                    break
                start_s = self._latest_start(job)
                if start_s > soon_s:
                    break
                heappop(queue)
                if self._pass_over(job):
                    continue
                self._leave(job)
                pressing[job_id] = start_s
                self._enter(job)

    def _pass_over(self, job: Job) -> bool:
        """Whether this is the one in a hundred that may be late: a long one, and nobody promised when it is done.

        Long is what makes the most room: as long as the work of the average GPU-second's video.
        """
        if self._may_be_late < 1.0 or job.deadline_s is not None or job.job_id in self._passed_over:
            return False
        if self._work_of[job.job_id] < (1.0 - NOISE) * self._rate.long_work_s:
            return False
        self._may_be_late -= 1.0
        self._passed_over.add(job.job_id)
        self._to_watch(job)
        return True

    def _due_s(self, job: Job) -> float:
        if job.deadline_s is not None:
            return job.deadline_s
        patience = PATIENCE if job.job_id in self._passed_over else 1.0
        return job.arrival_s + DUE_PART * self._tail.seconds * patience

    def _latest_start(self, job: Job) -> float:
        """From when on it just ends when due, on as many GPUs as it would get now but at most B."""
        profile = self.rib.profile(job.kind)
        degree = min(self._degree(job.kind, self._price), self.best_degree(job))
        return self._due_s(job) - (job.steps - job.step) * profile.step_s[degree] - profile.decode_s

    def _lateness(self, job: Job, left: float, degree: int, now_s: float) -> float:
        """Seconds after it is due, at this degree; where GPUs are too short, nobody counts as late."""
        if self._price >= BUSY_PRICE:
            return -math.inf
        profile = self.rib.profile(job.kind)
        return now_s + left * profile.step_s[degree] + profile.decode_s - self._due_s(job)

    # --- the price, and what it allows ----------------------------------------------------------------------------

    def _price_of(self, waiting: int) -> float:
        """Seconds of delay, summed over all videos, that a GPU-second spent now causes while so many others wait."""
        if not waiting and self.state.placement.free:
            return 0.0
        return (WAITING_WEIGHT * waiting + self._expected) / self._gpus

    def _expected_to_wait(self, now_s: float) -> float:
        """Of the videos that will come until the work at hand is done, those that a GPU-second spent now delays."""
        videos_per_s, work_per_s = self._rate.per_second(now_s)
        # Those that run are half done, taken together.
        backlog_s = (self._waiting_work + 0.5 * self._running_work) / self._gpus
        return DELAYED_PART * videos_per_s * backlog_s / (1.0 - min(MOST_LOAD, work_per_s / self._gpus))

    # --- giving ---------------------------------------------------------------------------------------------------

    def _admit(self, now_s: float, kept: int, decisions: list[Decision]) -> None:
        """Waiting videos in their order, each on as many free GPUs as the price allows, but not on servers kept."""
        placement = self.state.placement
        ready = self.lanes[None].ready
        others = len(ready) + self._to_encode
        while placement.free and (job := ready.first()) is not None:
            others -= 1
            price = self._price_of(others)
            wanted = self._degree(job.kind, price)
            pressing = job.job_id in self._pressing
            if pressing and self._lateness(job, job.steps - job.step, wanted, now_s) > 0.0:
                wanted = self._degree(job.kind, price / URGENT)
            slots = placement.block(placement.largest(wanted))
            if slots is None or (not pressing and kept >> placement.server_of[slots[0]].index & 1):
                return
            reason = f"first in the order; {len(slots)} of {wanted} GPUs at a price of {price:.2f}"
            decisions.append(self.grant_lease(job, slots, now_s, reason))

    def _help_late(self, now_s: float, decisions: list[Decision], even_where_none_is_free: bool = False) -> int:
        """Free GPUs to the latest video of each server that has some; gives the servers where room is being made.

        ``even_where_none_is_free``: room is also made on servers whose freed GPUs have gone to others already.
        """
        placement = self.state.placement
        kept = 0
        for index in bits(placement.freed_servers):
            free = placement.servers[index].free.bit_count()
            while (free or even_where_none_is_free) and (late := self._latest_on(index, now_s)) is not None:
                degree = len(late.lease)
                if degree > free:
                    if self._make_room(late, degree - free, now_s, decisions):
                        kept |= 1 << index
                    break
                self._grow(late, 2 * degree, "it is late", decisions)
                free -= degree
        return kept

    def _latest_on(self, server: int, now_s: float) -> Job | None:
        """The server's running video that is latest, of those that more GPUs would help."""
        latest, most_s = None, 0.0
        if self._price >= BUSY_PRICE:
            return None
        plain_s = DUE_PART * self._tail.seconds
        profile_of, passed_over = self.rib.profile, self._passed_over
        for job in self._on_server.get(server, {}).values():
            if job.settled_epoch != job.epoch or job.parking:
                continue
            # All at once, as this is asked most often: what ``_lateness`` gives does not change while steps go on.
            profile = profile_of(job.kind)
            degree = len(job.lease)
            end_s = job.step_at_s + (job.steps - job.step - 1) * profile.step_s[degree] + profile.decode_s
            plain = job.deadline_s is None and job.job_id not in passed_over
            late_s = end_s - (job.arrival_s + plain_s if plain else self._due_s(job))
            if late_s <= most_s or self._degree(job.kind, self._price / URGENT) <= degree:
                continue
            if self._saved_by_doubling(job, degree, self._steps_left(job, now_s) - 1.0) > 0.0:
                latest, most_s = job, late_s
        return latest

    def _make_room(self, late: Job, missing: int, now_s: float, decisions: list[Decision]) -> bool:
        """Have videos of the server that are in time give up ``missing`` slots; whether they will."""
        jobs = self._on_server[self.state.placement.server_of[late.lease[0]].index]
        missing -= sum([self._to_come.get(job_id, 0) for job_id in jobs])
        if missing <= 0:
            return True
        able = []
        for job in jobs.values():
            left = self._steps_left(job, now_s) - 1.0
            if job is not late and job.settled and job.priority <= late.priority and self._can_give(job, left, now_s):
                able.append((self._work_s(job, left), job.job_id, job))
        for _, _, job in sorted(able, reverse=True):
            if missing <= 0:
                break
            missing -= self._take_from(job, f"{late.job_id} is late", decisions)
        return missing <= 0

    # --- taking ---------------------------------------------------------------------------------------------------

    def _take(self, waiting: Job, now_s: float, decisions: list[Decision]) -> None:
        """Have one running video give up GPUs for the first waiting one."""
        victim = self._too_wide(waiting, now_s)
        if victim is not None:
            why = f"wider than pays off at a price of {self._price:.2f}, and {waiting.job_id} waits"
            self._take_from(victim, why, decisions)
            return
        victim = self._most_left(now_s)
        if victim is None or victim.priority > waiting.priority:
            return
        left = self._steps_left(victim, now_s) - 1.0
        if victim.priority == waiting.priority:
            if not self._can_give(victim, left, now_s):
                return
            margin_s = MARGIN_STEPS * self.rib.step_s(victim.kind, 1)
            longer = self._work_s(victim, left) - margin_s > self._work_s(waiting, waiting.steps - waiting.step)
            if not longer and waiting.job_id not in self._pressing:
                return
        if left > 1.0:
            self._take_from(victim, f"{waiting.job_id} comes before it and no GPU is free", decisions)

    def _can_give(self, job: Job, left: float, now_s: float) -> bool:
        """Whether it is worth halving or parking it, and it would still be in time (on one GPU, if it has one)."""
        return left > 1.0 and self._lateness(job, left, max(1, len(job.lease) // 2), now_s) <= 0.0

    def _too_wide(self, waiting: Job, now_s: float) -> Job | None:
        """A group wider than the price allows, of no higher priority, with enough left to do for a change to pay."""
        for (kind, degree), jobs in self._wide.items():
            if not jobs or degree <= self._degree(kind, self._price):
                continue
            even_if_late = degree > self._degree(kind, self._price / URGENT)
            for job in jobs.values():
                left = self._steps_left(job, now_s) - 1.0
                if job.priority > waiting.priority or left <= 1.0:
                    continue
                if even_if_late or self._can_give(job, left, now_s):
                    return job
        return None

    # --- who waits ------------------------------------------------------------------------------------------------

    def _arrived(self, event: JobArrived, now_s: float) -> list[Decision] | None:
        known = event.job_id in self.state.jobs
        decisions = super()._arrived(event, now_s)
        if not known:
            job = self.state.jobs[event.job_id]
            profile = self.rib.profile(job.kind)
            work_s = self._work_of[event.job_id]
            # On as many GPUs as it would get now, but at least half of B and at most B.
            best = self.best_degree(job)
            degree = min(best, max(best // 2, self._degree(job.kind, self._price)))
            own_s = (job.steps - job.step) * profile.step_s[degree] + profile.decode_s
            self._rate.arrived(work_s, now_s)
            self._tail.arrived(work_s, OWN_TIMES * own_s, self._gpus, now_s)
            self._may_be_late += LATE_SHARE
        return decisions
