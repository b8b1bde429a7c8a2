"""The requests and the cluster of a recorded run, to be simulated: how far simulator and stack agree shows here."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.messages.cluster import Service
from common.policies.video.events import JobArrived, WorkerJoined
from common.policies.video.rib import VideoKind
from loadgen.simulator.loop import Cluster
from loadgen.simulator.replay import TimedEvent, WrongRecord
from loadgen.workloads import Workload


def recorded_workload(recorded: Sequence[TimedEvent]) -> Workload:
    """The videos that arrived, by their own arrival times, the first at zero.

    Raises:
        WrongRecord: none arrived.
    """
    arrived = sorted(
        (event for _, event in recorded if isinstance(event, JobArrived)), key=lambda event: event.arrival_s
    )
    if not arrived:
        raise WrongRecord("the record has no JobArrived: nothing was asked for")
    first_s = arrived[0].arrival_s
    of_event = [VideoKind(event.width, event.height, event.frames) for event in arrived]
    kinds = tuple(sorted(set(of_event), key=lambda kind: kind.volume))
    return Workload(
        kinds,
        np.array([kinds.index(kind) for kind in of_event]),
        np.array([event.arrival_s - first_s for event in arrived]),
        tuple(event.steps for event in arrived),
        tuple(None if event.deadline_s is None else event.deadline_s - first_s for event in arrived),
        tuple(event.priority for event in arrived),
    )


def recorded_cluster(recorded: Sequence[TimedEvent]) -> Cluster:
    """The slots on which DiT workers joined.

    Raises:
        WrongRecord: there are none, or the servers differ in size, which the simulator has no form for.
    """
    slots = {
        event.slot: event.server
        for _, event in recorded
        if isinstance(event, WorkerJoined) and event.service is Service.DIT and event.slot is not None
    }
    sizes = Counter(slots.values())
    if len(set(sizes.values())) != 1:
        raise WrongRecord(f"the record's servers have {sorted(sizes.values())} slots; they must be there and alike")
    return Cluster(len(sizes), next(iter(sizes.values())))
