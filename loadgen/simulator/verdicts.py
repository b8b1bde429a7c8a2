"""What the runs of an experiment say: each policy at each point, and who is better than whom.

Works on the ``runs`` of the JSON alone, so that the page can be made from the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from loadgen.simulator.statistics import Estimate, mean_estimate, ratio_estimate

STATIC = ("sdop:1", "sdop:2", "sdop:4", "spci", "dpci")
MEASURES = ("mean", "p99")


class Place(NamedTuple):
    """A point of the experiment, as the runs name it."""

    point: str
    gpus: int
    mix: str
    load: float
    rate: float

    @property
    def text(self) -> str:
        where = f"load {self.load:g}" if self.point == "sweep" else self.point
        return f"{self.gpus} GPUs, {self.mix}, {where}"


@dataclass(slots=True)
class Series:
    """One policy at one place, seed by seed."""

    runs: list[Mapping[str, Any]] = field(default_factory=list)

    def values(self, measure: str) -> list[float]:
        return [float(run["latency_s"][measure]) for run in self.runs]

    def estimate(self, measure: str) -> Estimate:
        return mean_estimate(self.values(measure))

    def gpu_seconds_per_request(self) -> float:
        return mean_estimate([run["gpu_seconds"] / run["requests"] for run in self.runs]).value


Table = dict[Place, dict[str, Series]]


class Result(StrEnum):
    """``even``: the confidence interval of the ratio holds 1."""

    BETTER = "better"
    EVEN = "even"
    WORSE = "worse"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One policy against the best of others at one place; ``ratio`` below 1: it is better."""

    place: Place
    measure: str
    policy: str
    other: str
    own_s: float
    other_s: float
    ratio: Estimate

    @property
    def result(self) -> Result:
        if self.ratio.low > 1:
            return Result.WORSE
        return Result.BETTER if self.ratio.high < 1 else Result.EVEN


def place_of(run: Mapping[str, Any]) -> Place:
    return Place(run["point"], run["gpus"], run["mix"], run["load"], run["rate"])


def table_of(runs: Iterable[Mapping[str, Any]]) -> Table:
    """The runs by place and policy, in the order in which they come."""
    table: Table = {}
    for run in runs:
        table.setdefault(place_of(run), {}).setdefault(run["policy"], Series()).runs.append(run)
    return table


def against_best(table: Table, policy: str, others: Sequence[str] | None = None) -> list[Verdict]:
    """``policy`` against whichever of ``others`` (None: all) has the least seed average, at every place and measure."""
    found = []
    for place, by_policy in table.items():
        rivals = [name for name in by_policy if name != policy and (others is None or name in others)]
        if policy not in by_policy or not rivals:
            continue
        for measure in MEASURES:
            best = min(rivals, key=lambda name: by_policy[name].estimate(measure).value)
            found.append(_verdict(place, measure, policy, best, by_policy))
    return found


def compare(table: Table, place: Place, policy: str, other: str, measure: str) -> Verdict | None:
    """Two policies at one place; None where one of them was not run."""
    by_policy = table.get(place, {})
    if policy not in by_policy or other not in by_policy:
        return None
    return _verdict(place, measure, policy, other, by_policy)


def _verdict(place: Place, measure: str, policy: str, other: str, by_policy: Mapping[str, Series]) -> Verdict:
    own, theirs = by_policy[policy], by_policy[other]
    return Verdict(
        place,
        measure,
        policy,
        other,
        own.estimate(measure).value,
        theirs.estimate(measure).value,
        ratio_estimate(own.values(measure), theirs.values(measure)),
    )
