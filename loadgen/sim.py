"""``loadgen sim``: scheduling policies in virtual time, on as many GPUs as you like.

``--experiment ddit`` measures every policy at the points of the paper's evaluation (``loadgen/simulator/points.py``)
and writes the JSON that ``loadgen report`` makes a page of. ``--day`` simulates one day and says how long that took.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.policies.registry import UnknownPolicy, make_policy, policy_names
from common.policies.rib import Rib, WrongRib, paper_rib
from loadgen.simulator.bounds import bounds_at
from loadgen.simulator.cost import CostModel, Overheads
from loadgen.simulator.loop import Simulation, Stuck
from loadgen.simulator.outcome import summary
from loadgen.simulator.points import Point, WrongSize, check_gpus, points
from loadgen.simulator.statistics import Estimate
from loadgen.simulator.sweep import LEVELS, Setting, Task, run_tasks, timeline
from loadgen.simulator.verdicts import STATIC, Result, Verdict, against_best, table_of
from loadgen.simulator.write import write_experiment
from loadgen.workloads import MIXES, Pattern, UnknownMix, make_workload, mix_named, saturation_rate

EXPERIMENTS = ("ddit",)
SIZES = (8, 64)
DAY_S = 86_400.0
TIMELINE_POLICIES = ("ddit", "sdop:2", "elastic")
TIMELINE_S = (60.0, 120.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="ddit", help="whose evaluation (default: ddit)")
    parser.add_argument("--policy", nargs="+", metavar="NAME", help="only these policies (default: all)")
    parser.add_argument("--gpus", type=int, metavar="N", help="only this many GPUs, servers of 8 (default: 8 and 64)")
    parser.add_argument("--mix", nargs="+", metavar="NAME", help=f"only these mixes, of {', '.join(MIXES)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of every policy at every point (default: 20)")
    parser.add_argument("--requests", type=int, metavar="N", help="videos in a run (default: by the number of GPUs)")
    parser.add_argument("--rib", type=Path, metavar="FILE", help="a profile (default: the paper's figures)")
    parser.add_argument("--step-240p", type=float, metavar="S", help="the paper's 240p step on one GPU (default: 0.25)")
    parser.add_argument("--no-overheads", action="store_true", help="changes of a lease take no time (default: 1 ms)")
    parser.add_argument("--noise", type=float, default=0.0, metavar="SPREAD", help="spread of the videos' own speeds")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--quick", action="store_true", help="8 GPUs, three loads, 3 seeds, 100 videos")
    parser.add_argument("--day", action="store_true", help="simulate one day on 64 GPUs and print the seconds it took")
    parser.add_argument("--load", type=float, default=0.8, help="with --day: the load, of saturation (default: 0.8)")
    parser.add_argument("--json", dest="out", type=Path, metavar="OUT", help="write the runs here")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Carry out the command; the JSON is written here, one run a line."""
    try:
        _check(options)
        return _day(options) if options.day else _experiment(options)
    except (UnknownPolicy, UnknownMix, WrongSize, WrongRib, WrongArgument, Stuck) as error:
        raise SystemExit(f"loadgen sim: {error}") from None


class WrongArgument(ValueError):
    """An argument that makes no sense; the message says what to change."""


def _check(options: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("requests", 2), ("workers", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise WrongArgument(f"--{name} {value}: give {least} or more")
    if options.noise < 0:
        raise WrongArgument(f"--noise {options.noise}: give 0 or more")
    if options.load <= 0:
        raise WrongArgument(f"--load {options.load}: give a share of saturation above 0, for example 0.8")
    if options.rib is not None and options.step_240p is not None:
        raise WrongArgument("--step-240p belongs to the paper's table: leave it out when you give --rib")
    if options.step_240p is not None and options.step_240p <= 0:
        raise WrongArgument(f"--step-240p {options.step_240p}: give seconds above 0, for example 0.15")
    if options.rib is not None and not options.rib.is_file():
        raise WrongArgument(f"--rib {options.rib}: there is no such file; triptych profile writes one")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise WrongArgument(f"--json {options.out}: the folder does not exist; make it first")
    if options.gpus is not None:
        check_gpus(options.gpus)
    for name in options.policy or ():
        make_policy(name)
    for name in options.mix or ():
        mix_named(name)


def _rib(options: argparse.Namespace) -> Rib:
    if options.rib is not None:
        return Rib.from_json(options.rib.read_text(encoding="utf-8"))
    return paper_rib(options.step_240p or 0.25)


def _overheads(options: argparse.Namespace) -> Overheads:
    return Overheads.none() if options.no_overheads else Overheads()


# --- one day ----------------------------------------------------------------------------------------------------------


def _day(options: argparse.Namespace) -> dict[str, object]:
    rib, gpus = _rib(options), options.gpus or 64
    mix = mix_named((options.mix or ["even"])[0])
    kinds = tuple(rib.profiles)
    rate = options.load * saturation_rate(rib, kinds, mix, gpus)
    count = options.requests or round(rate * DAY_S)
    cluster = Point("day", gpus, mix.name, Pattern.POISSON, rate, options.load, count).cluster
    runs = []
    for name in options.policy or ["ddit"]:
        started_s = time.perf_counter()
        workload = make_workload(kinds, mix, Pattern.POISSON, rate, count, seed=0)
        outcome = Simulation(make_policy(name, rib=rib), cluster, workload, CostModel(rib, _overheads(options))).run()
        latency_s = summary(outcome.latency_s())
        wall_s = time.perf_counter() - started_s
        print(
            f"{name}: {outcome.makespan_s() / 3600:.1f} h on {gpus} GPUs at {options.load:g} of saturation, "
            f"{count:,} videos, {outcome.events:,} events in {wall_s:.1f} s; "
            f"latency mean {latency_s['mean']:.2f} s, p99 {latency_s['p99']:.2f} s"
        )
        runs.append(
            {
                "policy": name,
                "rate": rate,
                "load": options.load,
                "mix": mix.name,
                "gpus": gpus,
                "seed": 0,
                "requests": count,
                "completed": outcome.completed,
                "latency_s": latency_s,
                "gpu_seconds": outcome.total_gpu_seconds(),
                "wall_s": wall_s,
            }
        )
    result: dict[str, Any] = {"experiment": "day", "environment": _environment(rib, options), "runs": runs}
    if options.out is not None:
        write_experiment(options.out, result)
    return result


# --- the experiment ---------------------------------------------------------------------------------------------------


def _experiment(options: argparse.Namespace) -> dict[str, object]:
    rib = _rib(options)
    setting = Setting(rib.to_json(), _overheads(options), options.noise)
    policies = list(options.policy or policy_names())
    seeds = options.seeds or (3 if options.quick else 20)
    mixes = [mix_named(name) for name in options.mix or MIXES]
    sizes = [options.gpus] if options.gpus else SIZES[:1] if options.quick else SIZES
    places = [point for gpus in sizes for point in _points(rib, gpus, options, mixes)]
    tasks = [Task(point, policy, seeds, setting) for point in places for policy in policies]
    started_s = time.perf_counter()
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for done, (task_runs, curve) in enumerate(run_tasks(tasks, options.workers), 1):
        runs += task_runs
        curves.append(curve)
        _progress(done, len(tasks), started_s)
    result: dict[str, Any] = {
        "experiment": "ddit",
        "environment": _environment(rib, options) | {"wall_s": round(time.perf_counter() - started_s, 1)},
        "runs": runs,
        "levels": LEVELS,
        "curves": curves,
        "bounds": [bound for point in places if (bound := bounds_at(rib, point)) is not None],
        "timelines": _timelines(rib, setting, policies, min(sizes)),
    }
    if options.out is not None:
        write_experiment(options.out, result)
    _print_summary(runs)
    return result


def _points(rib: Rib, gpus: int, options: argparse.Namespace, mixes: Sequence[Any]) -> list[Point]:
    try:
        return points(rib, gpus, options.requests, mixes, options.quick)
    except ValueError as error:
        raise WrongArgument(str(error)) from None


def _timelines(rib: Rib, setting: Setting, policies: Sequence[str], gpus: int) -> list[dict[str, Any]]:
    """A minute of a moderately loaded cluster, the same requests under each policy."""
    mix = MIXES["even"]
    rate = 0.65 * saturation_rate(rib, tuple(rib.profiles), mix, gpus)
    count = max(2, round(rate * (TIMELINE_S[1] + 30)))
    point = Point("timeline", gpus, mix.name, Pattern.POISSON, rate, 0.65, count)
    chosen = [name for name in TIMELINE_POLICIES if name in policies]
    return [timeline(Task(point, name, 1, setting), 0, *TIMELINE_S) for name in chosen]


def _progress(done: int, count: int, started_s: float) -> None:
    if done == count or done % max(1, count // 10) == 0:
        print(f"{done} of {count} tasks, {time.perf_counter() - started_s:.0f} s", file=sys.stderr)


def _environment(rib: Rib, options: argparse.Namespace) -> dict[str, Any]:
    overheads = _overheads(options)
    return {
        "simulated": True,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rib": rib.to_json(),
        "rib_from": str(options.rib) if options.rib else "the paper's figures (brief, section 2.6)",
        "overheads_s": {name: getattr(overheads, name) for name in overheads.__slots__},
        "noise": options.noise,
        "saturation": "GPUs over the mean GPU-seconds of a request at degree 1, VAE included",
    }


def _print_summary(runs: Sequence[dict[str, Any]]) -> None:
    table = table_of(runs)
    for title, verdicts in (
        ("ddit against the best static policy (sdop, spci, dpci)", against_best(table, "ddit", STATIC)),
        ("elastic against the best of all others", against_best(table, "elastic")),
    ):
        if verdicts:
            print(title)
            for verdict in verdicts:
                print(f"  {_line(verdict)}")
            counts = {result: sum(verdict.result is result for verdict in verdicts) for result in Result}
            print("  " + ", ".join(f"{result}: {count}" for result, count in counts.items()))


def _line(verdict: Verdict) -> str:
    ratio: Estimate = verdict.ratio
    return (
        f"{verdict.place.text:42} {verdict.measure:4} {verdict.own_s:8.2f} s against {verdict.other_s:8.2f} s "
        f"of {verdict.other:18} ratio {ratio.text}: {verdict.result}"
    )
