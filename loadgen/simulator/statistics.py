"""Means and ratios with 95 % confidence intervals. Policies are compared seed by seed: each meets the same requests."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t, by its expansion around the normal one (within 1 % from 3 degrees on)."""
    if freedom < 3:
        return {1: 12.706, 2: 4.303}[freedom]
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean over seeds; one seed has no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    half = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def ratio_estimate(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The typical ratio of two policies' values, paired by seed (the geometric mean of the ratios)."""
    logs = mean_estimate([math.log(mine / other) for mine, other in zip(ours, theirs, strict=True)])
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))
