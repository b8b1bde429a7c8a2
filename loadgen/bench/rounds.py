"""Latencies of several policies, round by round, and what they come to: ratios with their spread, and verdicts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.simulator.outcome import summary

MEASURES = ("mean", "p99")
# Policies that choose a degree once for all.
STATIC = ("sdop:1", "sdop:2")


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds, between its quartiles. Below 1: ours is faster."""

    median: float
    first: float
    third: float
    rounds: int

    @property
    def verdict(self) -> str:
        """What may be said of it, given the spread."""
        if self.third < 1:
            return "better"
        if self.median <= 1 or self.first <= 1:
            return "no worse"
        return "WORSE"

    @property
    def text(self) -> str:
        return f"{self.median:.3f} ({self.first:.3f} to {self.third:.3f})"


@dataclass(frozen=True)
class Readings:
    """By policy, the latencies of every round in seconds; round i of all policies had the same requests."""

    rounds: Mapping[str, Sequence[Sequence[float]]]

    @property
    def count(self) -> int:
        """How many rounds there are, of each policy as many."""
        return len(next(iter(self.rounds.values())))

    def with_round(self, latencies: Mapping[str, Sequence[float]]) -> "Readings":
        """These, and one more round of every policy."""
        return Readings({policy: [*rounds, latencies[policy]] for policy, rounds in self.rounds.items()})

    def pooled(self, policy: str) -> dict[str, float]:
        """``mean p50 p90 p99 max`` over all rounds."""
        return summary(np.concatenate([np.asarray(latencies) for latencies in self.rounds[policy]]))

    def of(self, policy: str, measure: str) -> list[float]:
        """The measure in each round."""
        return [summary(np.asarray(latencies))[measure] for latencies in self.rounds[policy]]

    def ratio(self, ours: str, theirs: str, measure: str) -> Ratio:
        """Our measure over theirs, round by round."""
        pairs = zip(self.of(ours, measure), self.of(theirs, measure), strict=True)
        return spread([mine / other for mine, other in pairs])

    def better_static(self, measure: str) -> str | None:
        """The static choice whose typical round is the better one by this measure."""
        there = [policy for policy in STATIC if policy in self.rounds]
        return min(there, key=lambda policy: statistics.median(self.of(policy, measure)), default=None)


def spread(values: Sequence[float]) -> Ratio:
    """Median and quartiles; of a single value, that value."""
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0], len(values))
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, first, third, len(values))


def comparison(readings: Readings, ours: str, theirs: str) -> dict[str, object]:
    """One policy over another by every measure, for people and for ``--json``."""
    ratios = {measure: readings.ratio(ours, theirs, measure) for measure in MEASURES}
    return {
        "ours": ours,
        "theirs": theirs,
        "rounds": ratios["mean"].rounds,
        **{
            measure: {
                "median_ratio": ratio.median,
                "spread": {"first_quartile": ratio.first, "third_quartile": ratio.third},
                "verdict": ratio.verdict,
            }
            for measure, ratio in ratios.items()
        },
    }


def lines(readings: Readings) -> list[str]:
    """The readings in full: each policy, each over each one that stands before it, each over the better static one."""
    policies = list(readings.rounds)
    width = max(map(len, policies))
    found = [f"{'policy':<{width}}  {'mean':>8}  {'p99':>8}  over all rounds"]
    for policy in policies:
        whole = readings.pooled(policy)
        found.append(f"{policy:<{width}}  {whole['mean']:7.2f}s  {whole['p99']:7.2f}s")
    for index, ours in enumerate(policies):
        for theirs in policies[:index]:
            ratios = "  ".join(f"{measure} {readings.ratio(ours, theirs, measure).text}" for measure in MEASURES)
            found.append(f"{ours:<{width}} over {theirs:<{width}}  {ratios}")
    for ours in policies:
        if ours not in STATIC:
            found += [line for measure in MEASURES if (line := _against_static(readings, ours, measure))]
    return found


def _against_static(readings: Readings, ours: str, measure: str) -> str | None:
    static = readings.better_static(measure)
    if static is None:
        return None
    ratio = readings.ratio(ours, static, measure)
    return f"{ours} against the better static choice, by {measure}: {ratio.text} of {static}: {ratio.verdict}"
