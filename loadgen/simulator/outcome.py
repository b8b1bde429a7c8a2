"""What a run came to, request by request, and the figures that are made of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import FloatArray
from loadgen.workloads import Workload


class SpanKind(StrEnum):
    """What a slot did: worked on steps, decoded, or was held (which spans both, and the waiting between)."""

    DENOISE = "denoise"
    DECODE = "decode"
    HELD = "held"


class Span(NamedTuple):
    """One stretch of one slot's time; ``degree`` GPUs worked together."""

    slot: int
    start_s: float
    end_s: float
    video: int
    kind: SpanKind
    degree: int


@dataclass(slots=True)
class Outcome:
    """One run. The lists are in the order of arrival; a request's GPU-seconds are what it held, idle or not."""

    policy: str
    gpus: int
    kind: NDArray[np.int64]
    arrival_s: FloatArray
    start_s: list[float]
    end_s: list[float]
    gpu_seconds: list[float]
    completed: int = 0
    events: int = 0

    @staticmethod
    def empty(policy: str, gpus: int, workload: Workload) -> "Outcome":
        count = len(workload)
        return Outcome(
            policy,
            gpus,
            workload.kind,
            workload.arrival_s,
            [float("inf")] * count,
            [float("inf")] * count,
            [0.0] * count,
        )

    def latency_s(self) -> FloatArray:
        """From arrival to the stored file."""
        return np.asarray(self.end_s) - self.arrival_s

    def makespan_s(self) -> float:
        """From the first arrival to the last end."""
        return float(max(self.end_s) - self.arrival_s[0])

    def total_gpu_seconds(self) -> float:
        return float(np.sum(self.gpu_seconds))


def summary(values: FloatArray) -> dict[str, float]:
    """``mean p50 p90 p99 max``, percentiles by linear interpolation."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "mean": float(values.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(values.max()),
    }
