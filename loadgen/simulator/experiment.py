"""The experiment of ``loadgen sim --experiment ddit``: all policies at all points, the bounds, and a few timelines."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.policies.video.rib import Rib
from loadgen.simulator.bounds import bounds_at
from loadgen.simulator.points import Point, points
from loadgen.simulator.processes import in_processes
from loadgen.simulator.sweep import LEVELS, Setting, Task, run_task, timeline
from loadgen.simulator.verdicts import STATIC, Result, Verdict, against_best, table_of
from loadgen.workloads import MIXES, Mix, Pattern, saturation_rate

TIMELINE_POLICIES = ("ddit", "sdop:2", "elastic")
TIMELINE_S = (60.0, 120.0)
TIMELINE_LOAD = 0.65


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: every policy at the points of every size, with that many seeds."""

    policies: tuple[str, ...]
    sizes: tuple[int, ...]
    mixes: tuple[Mix, ...]
    seeds: int
    requests: int | None
    points: tuple[str, ...]
    quick: bool
    workers: int


def run_experiment(plan: Plan, setting: Setting) -> dict[str, Any]:
    """The experiment's part of the JSON; how far it is goes to standard error.

    Raises:
        ValueError: the mixes do not fit the profile.
    """
    rib = Rib.from_json(setting.rib)
    everywhere = [point for gpus in plan.sizes for point in points(rib, gpus, plan.requests, plan.mixes, plan.quick)]
    places = [point for point in everywhere if point.name in plan.points]
    tasks = [Task(point, policy, plan.seeds, setting) for point in places for policy in plan.policies]
    started_s = time.perf_counter()
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for done, (task_runs, curve) in enumerate(in_processes(run_task, tasks, plan.workers), 1):
        runs += task_runs
        curves.append(curve)
        if done == len(tasks) or done % max(1, len(tasks) // 10) == 0:
            print(f"{done} of {len(tasks)} tasks, {time.perf_counter() - started_s:.0f} s", file=sys.stderr)
    return {
        "wall_s": round(time.perf_counter() - started_s, 1),
        "runs": runs,
        "levels": LEVELS,
        "curves": curves,
        "bounds": [bound for point in places if (bound := bounds_at(rib, point)) is not None],
        "timelines": _timelines(rib, setting, plan),
    }


def _timelines(rib: Rib, setting: Setting, plan: Plan) -> list[dict[str, Any]]:
    """A minute of a moderately loaded cluster, the same requests under each policy."""
    mix, gpus = MIXES["even"], min(plan.sizes)
    rate = TIMELINE_LOAD * saturation_rate(rib, tuple(rib.profiles), mix, gpus)
    count = max(2, round(rate * (TIMELINE_S[1] + 30)))
    point = Point("timeline", gpus, mix.name, Pattern.POISSON, rate, TIMELINE_LOAD, count)
    chosen = [name for name in TIMELINE_POLICIES if name in plan.policies]
    return [timeline(Task(point, name, 1, setting), 0, *TIMELINE_S) for name in chosen]


def print_summary(runs: Sequence[dict[str, Any]]) -> None:
    """Who wins where, for people."""
    table = table_of(runs)
    for title, verdicts in (
        ("ddit against the best static policy (sdop, spci, dpci)", against_best(table, "ddit", STATIC)),
        ("elastic against the best of all others", against_best(table, "elastic")),
    ):
        if verdicts:
            print(title)
            for verdict in verdicts:
                print(f"  {line(verdict)}")
            counts = {result: sum(verdict.result is result for verdict in verdicts) for result in Result}
            print("  " + ", ".join(f"{result}: {count}" for result, count in counts.items()))


def line(verdict: Verdict) -> str:
    """A verdict in one line."""
    return (
        f"{verdict.place.text:42} {verdict.measure:4} {verdict.own_s:8.2f} s against {verdict.other_s:8.2f} s "
        f"of {verdict.other:18} ratio {verdict.ratio.text}: {verdict.result}"
    )
