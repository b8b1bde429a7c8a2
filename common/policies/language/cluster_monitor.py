"""The cluster monitor (TetriInfer, section 3.2): loads come in from decode instances, and go out in one broadcast.

Instances report when they like, the newest report of each counts; every ``period_s`` seconds all prefill instances are
told the loads of all decode instances at once. An instance whose last report is older than ``stale_s`` is left out: who
does not speak gets nothing new.
"""

from dataclasses import dataclass

from common.policies.language.decode_dispatch import DecodeLoad, LoadsBroadcast

PERIOD_S = 0.1
# What does not change is said again after so long: of an instance that says nothing for ten periods nothing is known.
REPEAT_S = 5 * PERIOD_S


@dataclass(frozen=True, slots=True)
class LoadReported:
    """An instance that decodes says how it is."""

    load: DecodeLoad


@dataclass(frozen=True, slots=True)
class StoppedDecoding:
    """It takes no more sequences: it flips, drains or is gone."""

    instance: str


@dataclass(frozen=True, slots=True)
class PeriodPassed:
    """Time to look at the clock."""


Event = LoadReported | StoppedDecoding | PeriodPassed


class ClusterMonitor:
    """Events in, broadcasts out.

    ``StoppedDecoding`` is told at once: what is sent after it would wait for an instance that does not take it.
    """

    def __init__(self, period_s: float = PERIOD_S, stale_s: float = 10 * PERIOD_S) -> None:
        if not 0 < period_s <= stale_s:
            raise ValueError("the period is above 0 s, and no report is stale before it has passed")
        self._period_s = period_s
        self._stale_s = stale_s
        self._reports: dict[str, tuple[float, DecodeLoad]] = {}
        self._told_s = float("-inf")

    def handle(self, event: Event, now_s: float) -> list[LoadsBroadcast]:
        """Take in one event; a broadcast if one is due."""
        match event:
            case LoadReported(load):
                self._reports[load.instance] = (now_s, load)
                return []
            case StoppedDecoding(instance):
                return [self._tell(now_s)] if self._reports.pop(instance, None) is not None else []
            case PeriodPassed():
                # Sums of floating-point numbers: a period that is short by a hair has passed.
                due = now_s - self._told_s >= self._period_s * (1 - 1e-9)
                return [self._tell(now_s)] if due else []

    def _tell(self, now_s: float) -> LoadsBroadcast:
        self._told_s = now_s
        fresh = [load for reported_s, load in self._reports.values() if now_s - reported_s <= self._stale_s]
        return LoadsBroadcast(tuple(sorted(fresh, key=lambda load: load.instance)))
