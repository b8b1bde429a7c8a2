"""The points of ``loadgen sim --experiment ddit``: DDiT's evaluation, on 8 and on 64 GPUs."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.policies.video.rib import Rib
from loadgen.simulator.loop import Cluster
from loadgen.workloads import MIXES, Mix, Pattern, Workload, make_workload, mix_named, saturation_rate

LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUICK_LOADS = (0.3, 0.6, 0.9)
SERVER_SLOTS = 8
# Mean loads; the high quarter of every period comes at 1.0 and at 1.5 of saturation, the rest at 0.2 and 0.3.
SQUARES = (("gentle square", 0.4), ("square", 0.6))
# The paper's rates are for one server; more servers get as many times the requests.
PAPER_RATES = (("rate 0.25", 0.25), ("rate 0.5", 0.5), ("overload", 1.0))
NAMES = ("sweep", *(name for name, _ in SQUARES), *(name for name, _ in PAPER_RATES), "burst")


@dataclass(frozen=True, slots=True)
class Point:
    """One place where every policy is measured. ``name`` is the paper's operating point, or "sweep"."""

    name: str
    gpus: int
    mix: str
    pattern: Pattern
    rate: float  # requests a second; 0 for a burst: all come at once
    load: float  # of saturation; 0 for a burst
    requests: int

    @property
    def cluster(self) -> Cluster:
        slots = min(self.gpus, SERVER_SLOTS)
        return Cluster(self.gpus // slots, slots)

    def workload(self, rib: Rib, seed: int) -> Workload:
        return make_workload(tuple(rib.profiles), mix_named(self.mix), self.pattern, self.rate, self.requests, seed)


class WrongSize(ValueError):
    """A number of GPUs that no whole servers make up."""


def check_gpus(gpus: int) -> None:
    """Whole servers of 8, or one smaller server.

    Raises:
        WrongSize: says what would do.
    """
    if gpus < 1 or (gpus > SERVER_SLOTS and gpus % SERVER_SLOTS):
        raise WrongSize(f"--gpus {gpus}: give 1 to {SERVER_SLOTS}, or a multiple of {SERVER_SLOTS} (servers of 8)")


def default_requests(gpus: int) -> int:
    """Enough for a p99 of several requests, and for the queue to show at high load."""
    return 300 if gpus <= SERVER_SLOTS else 160 + 10 * gpus


def points(rib: Rib, gpus: int, requests: int | None, mixes: Iterable[Mix], quick: bool) -> list[Point]:
    """Loads for every mix, then the paper's own operating points with the even mix."""
    count = requests or (100 if quick else default_requests(gpus))
    found = []
    for mix in mixes:
        full = saturation_rate(rib, tuple(rib.profiles), mix, gpus)
        for load in QUICK_LOADS if quick else LOADS:
            found.append(Point("sweep", gpus, mix.name, Pattern.POISSON, load * full, load, count))
        for name, load in SQUARES:
            found.append(Point(name, gpus, mix.name, Pattern.SQUARE, load * full, load, count))
    return found + _paper_points(rib, gpus, count)


def _paper_points(rib: Rib, gpus: int, count: int) -> list[Point]:
    even = MIXES["even"]
    full = saturation_rate(rib, tuple(rib.profiles), even, gpus)
    scale = gpus / SERVER_SLOTS
    found = [
        Point(name, gpus, even.name, Pattern.POISSON, rate * scale, rate * scale / full, count)
        for name, rate in PAPER_RATES
    ]
    at_once = max(1, round(100 * scale))
    return [*found, Point("burst", gpus, even.name, Pattern.BURST, 0.0, 0.0, at_once)]
