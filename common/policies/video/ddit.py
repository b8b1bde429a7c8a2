"""DDiT's greedy allocation: GPUs are given out one denoising step at a time.

Source: DDiT (arXiv 2506.13497), the greedy algorithm for requests as they arrive: a video gets what is free, up to its
optimal degree B; one below B is *hungry* and gets freed GPUs in descending order of its starvation time; nothing is
taken from a running video; B is a hard cap. The gaps are filled by us: a degree is a power of two, a group lies in one
server, hungry videos come before waiting ones. The paper's two ablations and the other order are subclasses here.
"""

from collections.abc import Iterable
from typing import ClassVar

from common.policies.video.decisions import Decision, GrantLease
from common.policies.video.placement import Placement, bits
from common.policies.video.policy import Policy
from common.policies.video.rib import Rib
from common.policies.video.state import Job, Phase


def starvation_time(rib: Rib, job: Job, optimal: int) -> float:
    """Seconds the job has lost for lack of GPUs since its lease last changed.

    Restarts at zero with every grant, as the formula is printed. ``optimal`` is the degree it should have.
    """
    lacking = rib.step_s(job.kind, len(job.active)) - rib.step_s(job.kind, optimal)
    return (job.step - job.last_step) * lacking


class Ddit(Policy):
    """The policy as the paper describes it: hungry videos before waiting ones."""

    name = "ddit"
    # Whether running videos get more GPUs (DoP promotion).
    promotes: ClassVar[bool] = True
    # Whether waiting videos come before hungry ones. Which of the two the paper does is not known.
    waiting_first: ClassVar[bool] = False

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        super().__init__(first_epoch, rib, placement)
        # By server: a group never leaves its own, so hungry videos compete only there.
        self._hungry: dict[int, dict[str, Job]] = {}
        self._servers_with_hungry = 0

    def schedule(self, now_s: float) -> list[Decision]:
        if self.waiting_first:
            return [*self._admit(now_s), *self._promote()]
        return [*self._promote(), *self._admit(now_s)]

    def watched(self) -> Iterable[str]:
        """Hungry videos that may have to be compared with another one: those whose server has two."""
        return [job_id for jobs in self._hungry.values() if len(jobs) > 1 for job_id in jobs]

    def _admit(self, now_s: float) -> list[Decision]:
        """First come, first served, on whatever is free up to B."""
        decisions: list[Decision] = []
        ready = self.lanes[None].ready
        placement = self.state.placement
        while placement.free and (job := ready.first()) is not None:
            optimal = self.best_degree(job)
            slots = placement.block(placement.largest(optimal))
            if slots is None:
                break
            degree = len(slots)
            hunger = "" if degree == optimal else f", hungry for {optimal}"
            decisions.append(self.grant_lease(job, slots, now_s, f"first in the queue; {degree} GPUs are free{hunger}"))
            if degree < optimal and self.promotes:
                self._is_hungry(job)
        return decisions

    def _promote(self) -> list[Decision]:
        """Freed GPUs go to the hungry of the same server, the most starved first, each up to B."""
        placement = self.state.placement
        decisions: list[Decision] = []
        if placement.freed_servers & self._servers_with_hungry:
            for server in bits(placement.freed_servers & self._servers_with_hungry):
                if placement.servers[server].free:
                    decisions += self._promote_in(server)
        placement.freed_servers = 0
        return decisions

    def _promote_in(self, server: int) -> list[Decision]:
        decisions: list[Decision] = []
        ranked = [
            (-starvation_time(self.rib, job, optimal), job.arrival_s, job.job_id, optimal, job)
            for job in self._hungry[server].values()
            if not job.parking
            for optimal in (self.best_degree(job),)
        ]
        for starved, _, _, optimal, job in sorted(ranked):
            more = self.state.placement.growth(job.lease, optimal)
            if more:
                decisions.append(self._grow(job, more, optimal, f"hungry, {-starved:.2f} s starved"))
        return decisions

    def _grow(self, job: Job, more: tuple[int, ...], optimal: int, why: str) -> GrantLease:
        degree = len(job.lease) + len(more)
        slots = (job.lease[0], *sorted(job.lease[1:] + more))
        grant = self.change_lease(job, slots, f"{why}: {len(job.lease)} -> {degree} of {optimal} GPUs")
        if degree >= optimal:
            self._is_fed(job)
        return grant

    def _is_hungry(self, job: Job) -> None:
        server = self.state.placement.server_of[job.slots[0]].index
        self._hungry.setdefault(server, {})[job.job_id] = job
        self._servers_with_hungry |= 1 << server

    def _is_fed(self, job: Job) -> None:
        server = self.state.placement.server_of[job.slots[0]].index
        jobs = self._hungry.get(server)
        if jobs is not None and jobs.pop(job.job_id, None) is not None and not jobs:
            self._servers_with_hungry &= ~(1 << server)

    def _hold(self, job: Job, slots: tuple[int, ...]) -> None:
        if job.slots and not slots:
            self._is_fed(job)
        super()._hold(job, slots)

    def _leave(self, job: Job) -> None:
        if job.phase is Phase.DENOISING and job.slots:
            self._is_fed(job)
        super()._leave(job)

    def _go_on_without(self, job: Job, lost: str, now_s: float) -> list[Decision]:
        decisions = super()._go_on_without(job, lost, now_s)
        if decisions and self.promotes and len(job.lease) < self.best_degree(job):
            self._is_hungry(job)
        return decisions


class DditNoPromotion(Ddit):
    """Ablation: the degree of a video is fixed when it starts."""

    name = "ddit-no-promotion"
    promotes: ClassVar[bool] = False


class DditNoDecoupling(Ddit):
    """Ablation: the whole group stays with the video while its master decodes."""

    name = "ddit-no-decoupling"
    decoupled: ClassVar[bool] = False


class DditWaitingFirst(Ddit):
    """The other order: waiting videos before hungry ones."""

    name = "ddit-waiting-first"
    waiting_first: ClassVar[bool] = True


class DynamicPartition(Ddit):
    """The paper's DP: like DDiT, but the degree is fixed at the start and the group is held through the decoding."""

    name = "dp"
    promotes: ClassVar[bool] = False
    decoupled: ClassVar[bool] = False
