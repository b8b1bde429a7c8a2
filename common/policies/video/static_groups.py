"""GPUs cut into groups in advance: the baselines SDoP, SPCI and DPCI of the DDiT paper.

* SDoP (static DoP): all groups have one size, and every video runs on one of them.
* SPCI (static partition and cluster isolation): the GPUs are split among the resolutions beforehand; no borrowing.
* DPCI (dynamic partition and cluster isolation): the same isolation, each class's groups have its optimal size B.

All three hold a group until the video is decoded. The paper's account leaves open how the historical mix becomes GPUs
and which degree SPCI has. Here a class's share is its part of the GPU-seconds that the mix asks for (by the number of
videos alone, the largest class would be overloaded first); SPCI's degree is 2. A class is a kind of the RIB; videos of
other kinds go with the nearest. A class for which nothing is left uses the groups of the one that has most.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.messages.cluster import Service
from common.policies.video.decisions import Decision
from common.policies.video.events import JobArrived, WorkerJoined
from common.policies.video.placement import Placement, power_of_two_within
from common.policies.video.policy import Lane, Policy
from common.policies.video.rib import Rib, VideoKind, video_kind
from common.policies.video.state import Job

SPCI_DEGREE = 2
# Steps of a video, where a mix is given by numbers of videos.
USUAL_STEPS = 30
# The split follows what has arrived; it is made anew at this many videos and at each doubling.
FIRST_SPLIT_AFTER = 8


@dataclass(slots=True)
class Group:
    """Slots that are given out together; ``busy`` of them are not free."""

    slots: tuple[int, ...]
    pool: "Pool"
    index: int
    busy: int = 0


class Pool:
    """The groups of one class."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._free: list[int] = []

    @property
    def gpus(self) -> int:
        return sum(len(group.slots) for group in self.groups)

    def add(self, slots: tuple[int, ...]) -> Group:
        group = Group(slots, self, len(self.groups))
        self.groups.append(group)
        return group

    def freed(self, group: Group) -> None:
        heapq.heappush(self._free, group.index)

    def first_free(self) -> tuple[int, ...] | None:
        """The slots of the first group that is wholly free."""
        while self._free:
            group = self.groups[self._free[0]]
            if group.busy == 0:
                return group.slots
            heapq.heappop(self._free)
        return None


class GroupedPlacement(Placement):
    """Keeps count of which groups are wholly free."""

    def __init__(self) -> None:
        super().__init__()
        self.group_of: dict[int, Group] = {}

    def put(self, numbers: Sequence[int]) -> None:
        super().put(numbers)
        for number in numbers:
            group = self.group_of.get(number)
            if group is not None:
                group.busy -= 1
                if group.busy == 0:
                    group.pool.freed(group)

    def take(self, numbers: Sequence[int]) -> None:
        super().take(numbers)
        for number in numbers:
            group = self.group_of.get(number)
            if group is not None:
                group.busy += 1

    def regroup(self, groups: Sequence[Group]) -> None:
        """From now on these are the groups."""
        self.group_of = {number: group for group in groups for number in group.slots}
        for group in groups:
            group.busy = sum(not self.is_free(number) for number in group.slots)
            if group.busy == 0:
                group.pool.freed(group)


class StaticGroups(Policy):
    """Base: each class of videos has a pool of groups and takes from it, first come, first served."""

    decoupled: ClassVar[bool] = False

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None) -> None:
        self._grouped = GroupedPlacement()
        super().__init__(first_epoch, rib, self._grouped)
        self._pools: dict[object, Pool] = {}
        self._stale = True

    def schedule(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        if not any(len(lane.ready) for lane in self.lanes.values()):
            return decisions
        if self._stale:
            self._cut()
        for key, lane in self.lanes.items():
            pool = self._pools.get(key)
            while pool and (job := lane.ready.first()) is not None and (slots := pool.first_free()) is not None:
                reason = f"first in its queue; a group of {len(slots)} is free"
                decisions.append(self.grant_lease(job, slots, now_s, reason))
        return decisions

    def shares(self) -> Mapping[object, tuple[float, int]]:
        """By class: its part of the GPUs, in any unit, and the size of its groups."""
        raise NotImplementedError

    def _worker_joined(self, event: WorkerJoined, now_s: float) -> list[Decision] | None:
        if event.service is Service.DIT and event.slot not in self._grouped.group_of:
            self._stale = True
        return super()._worker_joined(event, now_s)

    def _cut(self) -> None:
        """Cut all slots with a DiT worker into groups. Videos that run keep what they have until they end."""
        self._stale = False
        scratch = Placement()
        for number, server in sorted(self._grouped.server_of.items()):
            scratch.join(number, str(server.index))
            if self.state.slots[number].dit is not None or self.state.slots[number].job_id is not None:
                scratch.put([number])
        shares = dict(self.shares())
        counts = _group_counts(shares, scratch.free_count)
        pools: dict[object, Pool] = {key: Pool() for key in shares}
        groups: list[Group] = []
        for key in sorted(counts, key=lambda key: -shares[key][1]):
            for _ in range(counts[key]):
                slots = scratch.block(shares[key][1])
                if slots is not None:
                    scratch.take(slots)
                    groups.append(pools[key].add(slots))
        self._grouped.regroup(groups)
        richest = max(pools.values(), key=lambda pool: pool.gpus, default=Pool())
        self._pools = {key: pool if pool.groups else richest for key, pool in pools.items()}


class StaticDegree(StaticGroups):
    """SDoP: one size of group for every video; ``name`` is ``sdop:N``."""

    name = "sdop"

    def __init__(self, degree: int, first_epoch: int = 1, rib: Rib | None = None) -> None:
        super().__init__(first_epoch, rib)
        self.degree = degree
        self.name = f"sdop:{degree}"

    def shares(self) -> Mapping[object, tuple[float, int]]:
        return {None: (1.0, self.degree)}


class IsolatedPartition(StaticGroups):
    """What SPCI and DPCI share.

    Args:
        mix: the historical mix, as videos (in any unit) by kind; None: what has arrived so far.
    """

    def __init__(
        self, first_epoch: int = 1, rib: Rib | None = None, mix: Mapping[VideoKind, float] | None = None
    ) -> None:
        super().__init__(first_epoch, rib)
        self.lanes.clear()
        self._mix = mix
        self._seconds: dict[VideoKind, float] = {}
        self._arrivals = 0
        self._next_cut = FIRST_SPLIT_AFTER
        for kind, videos in (mix or {}).items():
            self._count(kind, USUAL_STEPS, videos)

    def degree(self, kind: VideoKind) -> int:
        """The size of the groups of this class."""
        raise NotImplementedError

    def lane(self, job: Job) -> Lane:
        key = self.rib.nearest(job.kind)
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane()
        return lane

    def shares(self) -> Mapping[object, tuple[float, int]]:
        return {kind: (seconds, self.degree(kind)) for kind, seconds in self._seconds.items()}

    def _arrived(self, event: JobArrived, now_s: float) -> list[Decision] | None:
        kind = video_kind(event.width, event.height, event.frames)
        if self._mix is None or self.rib.nearest(kind) not in self._seconds:
            self._count(kind, event.steps, 1.0)
        self._arrivals += 1
        if self._mix is None and self._arrivals >= self._next_cut:
            self._next_cut *= 2
            self._stale = True
        return super()._arrived(event, now_s)

    def _count(self, kind: VideoKind, steps: int, videos: float) -> None:
        key = self.rib.nearest(kind)
        if key not in self._seconds:
            self._stale = True
        degree = self.degree(key)
        profiled = min(degree, self.rib.degrees[-1])
        held_s = steps * self.rib.step_s(kind, profiled) + self.rib.decode_s(kind)
        self._seconds[key] = self._seconds.get(key, 0.0) + videos * degree * held_s

    def _within_server(self, degree: int) -> int:
        return min(degree, max(1, power_of_two_within(self.state.placement.largest_server)))


class StaticPartition(IsolatedPartition):
    """SPCI: isolated classes, one degree for all."""

    name = "spci"

    def degree(self, kind: VideoKind) -> int:
        return self._within_server(SPCI_DEGREE)


class OptimalPartition(IsolatedPartition):
    """DPCI: isolated classes, each with its optimal degree."""

    name = "dpci"

    def degree(self, kind: VideoKind) -> int:
        return self._within_server(self.rib.optimal_degree(kind))


def _group_counts(shares: Mapping[object, tuple[float, int]], gpus: int) -> dict[object, int]:
    """How many groups each class gets: one each, the largest share first, then whoever has least for its share."""
    counts = dict.fromkeys(shares, 0)
    for key in sorted(shares, key=lambda key: -shares[key][0]):
        size = shares[key][1]
        if size <= gpus:
            counts[key] += 1
            gpus -= size
    heap = [
        ((counts[key] + 1) * size / max(share, 1e-9), at, key) for at, (key, (share, size)) in enumerate(shares.items())
    ]
    heapq.heapify(heap)
    while heap:
        _, at, key = heapq.heappop(heap)
        share, size = shares[key]
        if size <= gpus:
            counts[key] += 1
            gpus -= size
            heapq.heappush(heap, ((counts[key] + 1) * size / max(share, 1e-9), at, key))
    return counts
