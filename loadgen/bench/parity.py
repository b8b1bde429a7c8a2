"""What the simulator says of a live run, from the machine's own profile, against what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.policies.registry import make_policy
from common.policies.rib import Rib
from loadgen.arrivals import FloatArray
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
    """The latencies of the workload's requests on one server of so many slots."""
    return simulate(make_policy(policy, rib=rib), Cluster(1, slots), workload, CostModel(rib)).latency_s()


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
