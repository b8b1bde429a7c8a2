"""What the runs say: TetriInfer against its baseline as the paper counts it, and ours against whichever is best."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loadgen.simulator.statistics import Estimate, ratio_estimate

OURS = "fluid"
BASELINE = "coupled-16"
# What the names of setups of ``reserve`` end with that swap.
SWAPPING = ", swapping"
MEASURES = ("ttft_s", "jct_s")
# Two clusters whose means differ by less are called even.
TOLERANCE = 0.01


Runs = Mapping[str, Sequence[Mapping[str, Any]]]


Place = tuple[str, str, float | None]  # point, class of requests, requests a second


def places(runs: Iterable[Mapping[str, Any]]) -> dict[Place, dict[str, list[Mapping[str, Any]]]]:
    """Runs by place, then by policy: at a place all meet the same requests."""
    found: dict[Place, dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        found.setdefault((run["point"], run["class"], run["rate"]), {}).setdefault(run["policy"], []).append(run)
    return found


def mean(runs: Sequence[Mapping[str, Any]], measure: str, of: str = "mean") -> float:
    """Over seeds; ``measure`` with parts gives its ``of``, a plain one itself."""
    values = [run[measure][of] if isinstance(run[measure], Mapping) else run[measure] for run in runs]
    return statistics.fmean(values)


@dataclass(frozen=True, slots=True)
class Against:
    """One policy's measures over another's, each the mean over seeds of the ratio's complement or of the ratio."""

    ttft_cut: float
    jct_cut: float
    resources: float

    @property
    def perf_per_dollar(self) -> float:
        """As all five of the paper's figures (section 5.1) come out, which is not the usual speed-up over cost."""
        return (1 + self.jct_cut) / self.resources

    @property
    def usual(self) -> float:
        """Speed-up over cost, as it is usually meant."""
        return 1 / ((1 - self.jct_cut) * self.resources)


def against_baseline(by_policy: Runs, policy: str = "tetriinfer", baseline: str = BASELINE) -> Against:
    """The paper's comparison; means first, then their ratios, as the paper has one run of each."""
    own, base = by_policy[policy], by_policy[baseline]
    return Against(
        1 - mean(own, "ttft_s") / mean(base, "ttft_s"),
        1 - mean(own, "jct_s") / mean(base, "jct_s"),
        mean(own, "resource_s") / mean(base, "resource_s"),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours over the best other at one place, paired by seed; below 1 it is better."""

    point: str
    of: str
    rate: float | None
    measure: str
    rival: str
    ratio: Estimate

    @property
    def worse(self) -> bool:
        return self.ratio.low > 1 + TOLERANCE

    @property
    def better(self) -> bool:
        return self.ratio.high < 1


def ours_against_best(runs: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """At every place where ours was run, for each measure, against whichever other is best there."""
    found = []
    for (point, of, rate), by_policy in places(runs).items():
        if OURS not in by_policy:
            continue
        own = by_policy[OURS]
        rivals = [name for name, other in by_policy.items() if name != OURS]
        for measure in MEASURES:
            if not rivals:
                continue
            rival = min(rivals, key=partial(_mean_of, by_policy, measure))
            ratio = ratio_estimate(_values(own, measure), _values(by_policy[rival], measure))
            found.append(Verdict(point, of, rate, measure, rival, ratio))
    return found


def _values(runs: Sequence[Mapping[str, Any]], measure: str) -> list[float]:
    return [run[measure]["mean"] for run in sorted(runs, key=lambda run: run["seed"])]


def _mean_of(by_policy: Runs, measure: str, policy: str) -> float:
    return mean(by_policy[policy], measure)
