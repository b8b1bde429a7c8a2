"""What a scheduling decision costs: ``Policy.handle`` for every policy, by the size of the cluster and of the queue.

Each policy serves a closed population: whenever a video is done, the next one comes, so that the number of videos stays
the same and all of them but those that run wait. Servers have 8 slots; the kinds of video are the paper's three, in
turn. Only the calls to ``handle`` are timed, in CPU time of the thread, so that a busy machine does not count. Steps
that change nothing are timed apart: they are most of a live system's events and the cheapest.
"""

import argparse
import gc
import heapq
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.policy import Policy
from common.policies.video.registry import make_policy, policy_names
from common.policies.video.rib import Rib, paper_rib
from common.policies.video.state import Job, Phase
from loadgen.counts import count

SERVER_SLOTS = 8
STEPS = 30
SIZES = ((64, 200), (512, 2_500), (4_096, 20_000))
TARGET_US = 100.0


@dataclass(frozen=True)
class Reading:
    """One policy at one size; microseconds a call. ``step_us`` is a step's end that changes nothing."""

    policy: str
    slots: int
    videos: int
    mean_us: float
    p50_us: float
    p99_us: float
    step_us: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", action="append", choices=policy_names(), help="only this one (may be repeated)")
    parser.add_argument("--events", type=count, default=6_000, help="timed events at each size")
    parser.add_argument("--largest", type=count, default=len(SIZES), help="how many of the sizes, smallest first")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure, print, and return what ``--json`` writes."""
    readings: list[Reading] = []
    exponents: dict[str, float] = {}
    sizes = SIZES[: arguments.largest]
    print(f"{'policy':20} " + " ".join(f"{f'{slots} slots, {videos} videos':>34}" for slots, videos in sizes))
    print(f"{'':20} " + " ".join(f"{'mean   p50   p99  plain step (µs)':>34}" for _ in sizes) + "  exponent")
    for name in arguments.policy or policy_names():
        of_policy = [measure(name, slots, videos, arguments.events) for slots, videos in sizes]
        readings += of_policy
        exponents[name] = growth_exponent([(one.videos, one.mean_us) for one in of_policy])
        cells = (f"{one.mean_us:9.1f} {one.p50_us:5.1f} {one.p99_us:5.1f} {one.step_us:12.2f}" for one in of_policy)
        print(f"{name:20} " + " ".join(f"{cell:>34}" for cell in cells) + f"  {exponents[name]:8.2f}", flush=True)
    worst = max((one.mean_us for one in readings if (one.slots, one.videos) == SIZES[0]), default=0.0)
    print(f"at {SIZES[0][0]} slots and {SIZES[0][1]} videos the dearest policy takes {worst:.1f} µs an event;")
    print(f"the target is {TARGET_US:.0f} µs. An exponent of 1 would be linear growth with the number of videos.")
    return {"benchmark": "decisions", "readings": [vars(one) for one in readings], "exponents": exponents}


def measure(name: str, slots: int, videos: int, events: int) -> Reading:
    """Fill the cluster, let a fifth of the events pass, then time the rest."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        crowd = _Crowd(make_policy(name), paper_rib(), slots)
        for _ in range(videos):
            crowd.arrive()
        crowd.advance(events // 5 + slots)
        crowd.timed_ns.clear()
        crowd.advance(events)
        spent_us = [spent / 1e3 for spent in crowd.timed_ns]
        step_us = crowd.plain_step_us()
    finally:
        if collecting:
            gc.enable()
    p99 = statistics.quantiles(spent_us, n=100)[98]
    return Reading(name, slots, videos, statistics.fmean(spent_us), statistics.median(spent_us), p99, step_us)


def growth_exponent(points: Sequence[tuple[int, float]]) -> float:
    """The slope of log(cost) over log(size), by least squares; 0 for a single point."""
    if len(points) < 2:
        return 0.0
    slope, _ = statistics.linear_regression(
        [math.log(size) for size, _ in points], [math.log(cost) for _, cost in points]
    )
    return slope


@dataclass
class _Run:
    """A video's steps from ``base`` on: step ``base + k`` ends at ``began_s + k * step_s``."""

    epoch: int
    base: int
    began_s: float
    step_s: float
    told: decide.GrantLease | decide.ParkJob | None = None
    version: int = 0

    def next_step(self, now_s: float) -> tuple[int, float]:
        """The step that ends next, and when."""
        done = int((now_s - self.began_s) / self.step_s + 1e-9) + 1
        return self.base + done, self.began_s + done * self.step_s


@dataclass
class _Crowd:
    """The smallest cluster that keeps a policy busy; workers fail never and take what the profile says."""

    policy: Policy
    rib: Rib
    slots: int
    now_s: float = 0.0
    timed_ns: list[int] = field(default_factory=list)
    _heap: list[tuple[float, int, str, str, int]] = field(default_factory=list)
    _runs: dict[str, _Run] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _count: int = 0
    _pushed: int = 0

    def __post_init__(self) -> None:
        self._tell(event.WorkerJoined("encoder-0", Service.ENCODER))
        for slot in range(self.slots):
            server = f"server-{slot // SERVER_SLOTS}"
            self._tell(event.WorkerJoined(f"dit-{slot}", Service.DIT, slot, server))
            self._tell(event.WorkerJoined(f"vae-{slot}", Service.VAE, slot, server))

    def arrive(self) -> None:
        kind = list(self.rib.profiles)[self._count % len(self.rib.profiles)]
        job_id = f"video-{self._count}"
        self._count += 1
        self._tell(event.JobArrived(job_id, self.now_s, kind.width, kind.height, kind.frames, STEPS))

    def advance(self, events: int) -> None:
        """Let so many things happen."""
        until = len(self.timed_ns) + events
        while len(self.timed_ns) < until and self._heap:
            self.now_s, _, what, job_id, version = heapq.heappop(self._heap)
            if version == self._versions.get(job_id, 0):
                self._happen(what, job_id)

    def plain_step_us(self) -> float:
        """The cost of a step's end under an unchanged lease."""
        jobs = [job for job in self.policy.state.by_phase[Phase.DENOISING].values() if job.settled][:500]
        told = [event.StepFinished(job.job_id, job.epoch, job.step) for job in jobs]
        began = time.thread_time_ns()
        for step in told:
            self.policy.handle(step, self.now_s)
        return (time.thread_time_ns() - began) / 1e3 / max(1, len(told))

    def _happen(self, what: str, job_id: str) -> None:
        job = self.policy.state.jobs[job_id]
        match what:
            case "encoded":
                self._tell(event.PromptEncoded(job_id, job.attempt))
            case "boundary":
                self._boundary(job)
            case "parked":
                self._tell(event.JobParked(job_id, job.epoch, self._runs.pop(job_id).base))
            case "denoised":
                self._tell(event.DenoisingFinished(job_id, self._runs.pop(job_id).epoch))
            case _:
                self._versions.pop(job_id, None)
                self._tell(event.DecodingFinished(job_id, job.epoch))
                self.arrive()

    def _boundary(self, job: Job) -> None:
        run = self._runs[job.job_id]
        told, run.told = run.told, None
        step = run.base + round((self.now_s - run.began_s) / run.step_s)
        if isinstance(told, decide.GrantLease):
            before = run.epoch
            self._start(told, step)
            self._tell(event.StepFinished(job.job_id, before, step, told.epoch))
        else:
            run.base = step
            self._push(0.0, "parked", job.job_id)

    def _start(self, lease: decide.GrantLease, step: int) -> None:
        kind = self.policy.state.jobs[lease.job_id].kind
        step_s = self.rib.step_s(kind, len(lease.members))
        self._runs[lease.job_id] = _Run(lease.epoch, step, self.now_s, step_s)
        self._push((STEPS - step) * step_s, "denoised", lease.job_id)

    def _tell(self, happened: event.Event) -> None:
        for job_id in self.policy.watched():
            run = self._runs.get(job_id)
            if run is not None:
                self.policy.handle(event.StepFinished(job_id, run.epoch, run.next_step(self.now_s)[0] - 1), self.now_s)
        began = time.thread_time_ns()
        decisions = self.policy.handle(happened, self.now_s)
        self.timed_ns.append(time.thread_time_ns() - began)
        for decision in decisions:
            self._obey(decision)

    def _obey(self, decision: decide.Decision) -> None:
        match decision:
            case decide.StartEncoding(job_id=job_id):
                self._push(0.0, "encoded", job_id)
            case decide.GrantLease(job_id=job_id) if job_id not in self._runs:
                self._start(decision, decision.from_step)
            case decide.GrantLease(job_id=job_id) | decide.ParkJob(job_id=job_id):
                run = self._runs[job_id]
                step, at_s = run.next_step(self.now_s)
                if run.told is None and step < STEPS:
                    self._push(at_s - self.now_s, "boundary", job_id)
                if step < STEPS:
                    run.told = decision
            case decide.StartDecoding(job_id=job_id):
                self._push(self.rib.decode_s(self.policy.state.jobs[job_id].kind), "decoded", job_id)
            case _:
                pass

    def _push(self, after_s: float, what: str, job_id: str) -> None:
        """What was to happen to this video before is void."""
        self._pushed += 1
        self._versions[job_id] = self._versions.get(job_id, 0) + 1
        heapq.heappush(self._heap, (self.now_s + after_s, self._pushed, what, job_id, self._versions[job_id]))
