"""Runs policies at points, for every seed the same requests under each policy, and gives what the JSON holds."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.policies.video.registry import make_policy
from common.policies.video.rib import Rib
from loadgen.arrivals import FloatArray
from loadgen.simulator.cost import CostModel, Noise, Overheads
from loadgen.simulator.loop import Simulation, Watch
from loadgen.simulator.outcome import Outcome, Span, summary
from loadgen.simulator.points import Point

# Levels of the pooled latency distribution, in per cent: finer where p99 lies.
LEVELS = tuple([*range(95), *(95 + 0.25 * step for step in range(21))])


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same in all runs. ``step_noise`` is the relative spread of the videos' own speeds."""

    rib: str  # as JSON: tasks go to other processes
    overheads: Overheads
    step_noise: float = 0.0

    def cost(self, seed: int) -> CostModel:
        return CostModel(Rib.from_json(self.rib), self.overheads, Noise(self.step_noise, seed))


@dataclass(frozen=True, slots=True)
class Task:
    """One policy at one point, all seeds."""

    point: Point
    policy: str
    seeds: int
    setting: Setting


def run_once(task: Task, seed: int, watch: Watch | None = None) -> Outcome:
    cost = task.setting.cost(seed)
    workload = task.point.workload(cost.rib, seed)
    policy = make_policy(task.policy, rib=cost.rib)
    return Simulation(policy, task.point.cluster, workload, cost, watch=watch).run()


def run_task(task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The runs of a task, and the distribution of their latencies, all seeds together."""
    runs, latencies = [], []
    for seed in range(task.seeds):
        outcome = run_once(task, seed)
        runs.append(run_record(task, seed, outcome))
        latencies.append(outcome.latency_s())
    return runs, {**_where(task), "latency_s": _rounded(np.percentile(np.concatenate(latencies), LEVELS))}


def run_record(task: Task, seed: int, outcome: Outcome) -> dict[str, Any]:
    """One entry of ``runs``, as ``design.md`` has it, with the load, the mix and what the bound needs."""
    latency_s = outcome.latency_s()
    classes = [latency_s[outcome.kind == number] for number in range(len(Rib.from_json(task.setting.rib).profiles))]
    return {
        **_where(task),
        "seed": seed,
        "requests": len(latency_s),
        "completed": outcome.completed,
        "latency_s": {name: round(value, 4) for name, value in summary(latency_s).items()},
        "class_latency_s": [round(float(of_class.mean()), 4) if len(of_class) else None for of_class in classes],
        "class_requests": [len(of_class) for of_class in classes],
        "gpu_seconds": round(outcome.total_gpu_seconds(), 3),
        "makespan_s": round(outcome.makespan_s(), 3),
    }


def timeline(task: Task, seed: int, start_s: float, end_s: float) -> dict[str, Any]:
    """What every slot did between two moments: rows of slot, start, end, video, class, what, degree."""
    spans: list[Span] = []
    outcome = run_once(task, seed, Watch(spans=spans, spans_until_s=end_s))
    rows = [
        (slot, round(began_s, 3), round(ended_s, 3), video, int(outcome.kind[video]), what.value, degree)
        for slot, began_s, ended_s, video, what, degree in sorted(spans)
        if ended_s > start_s and began_s < end_s and ended_s > began_s
    ]
    return {**_where(task), "seed": seed, "start_s": start_s, "end_s": end_s, "spans": rows}


def _where(task: Task) -> dict[str, Any]:
    point = task.point
    return {
        "policy": task.policy,
        "point": point.name,
        "gpus": point.gpus,
        "mix": point.mix,
        "arrivals": point.pattern.value,
        "rate": round(point.rate, 6),
        "load": round(point.load, 4),
    }


def _rounded(values: FloatArray) -> list[float]:
    return [round(float(value), 3) for value in values]
