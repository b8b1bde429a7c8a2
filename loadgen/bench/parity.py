"""What the simulator says of a live run, from the machine's own profile, against what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.policies.video.registry import make_policy
from common.policies.video.rib import Rib
from loadgen.arrivals import FloatArray
from loadgen.bench.live import warm_up_steps
from loadgen.simulator.cost import CostModel
from loadgen.simulator.loop import Cluster, simulate
from loadgen.simulator.outcome import summary
from loadgen.workloads import Workload

# By how much of the measured value the simulated one may be off.
PROMISED = {"mean": 0.15, "p99": 0.25}


@dataclass(frozen=True)
class Parity:
    """One policy's measure over all rounds, in seconds."""

    policy: str
    measure: str
    simulated_s: float
    measured_s: float

    @property
    def off(self) -> float:
        """The simulated value's distance as a share of the measured one; above 0: simulated too slow."""
        return self.simulated_s / self.measured_s - 1

    @property
    def kept(self) -> bool:
        return abs(self.off) <= PROMISED[self.measure]

    def as_dict(self) -> dict[str, object]:
        return {
            "policy": self.policy,
            "measure": self.measure,
            "simulated_s": self.simulated_s,
            "measured_s": self.measured_s,
            "off": self.off,
            "kept": self.kept,
        }

    @property
    def text(self) -> str:
        return (
            f"{self.policy} {self.measure}: simulated {self.simulated_s:.2f} s, measured {self.measured_s:.2f} s, "
            f"{100 * self.off:+.1f} %; promised within {100 * PROMISED[self.measure]:.0f} %: "
            f"{'kept' if self.kept else 'NOT kept'}"
        )


def simulated(policy: str, workload: Workload, rib: Rib, slots: int) -> FloatArray:
    """The latencies of the workload's requests on one server of so many slots, after the stack's warm-up.

    The warm-up counts too: a policy that learns from what came hears of it in the live run.
    """
    whole = _after_warm_up(workload, rib, slots)
    latencies_s = simulate(make_policy(policy, rib=rib), Cluster(1, slots), whole, CostModel(rib)).latency_s()
    return latencies_s[-len(workload) :]


def _after_warm_up(workload: Workload, rib: Rib, slots: int) -> Workload:
    """Kind by kind a short video for every slot, with time for one after the other; then the workload itself."""
    steps = warm_up_steps(workload)
    arrival_s: list[float] = []
    now_s = 0.0
    for kind in workload.kinds:
        profile = rib.profile(kind)
        arrival_s += [now_s] * slots
        now_s += slots * (profile.encode_s + steps * max(profile.step_s.values()) + profile.decode_s)
    before = len(arrival_s)
    return Workload(
        workload.kinds,
        np.concatenate([np.repeat(np.arange(len(workload.kinds)), slots), workload.kind]),
        np.concatenate([np.asarray(arrival_s), workload.arrival_s + now_s]),
        (*(steps,) * before, *workload.steps),
    )


def parities(
    measured: Mapping[str, Sequence[Sequence[float]]], workloads: Sequence[Workload], rib: Rib, slots: int
) -> list[Parity]:
    """Every policy by every measure. ``measured``: by policy, the latencies of each round's workload."""
    found = []
    for policy, rounds in measured.items():
        there = summary(np.concatenate([np.asarray(latencies) for latencies in rounds]))
        here = summary(np.concatenate([simulated(policy, workload, rib, slots) for workload in workloads]))
        found += [Parity(policy, measure, here[measure], there[measure]) for measure in PROMISED]
    return found
