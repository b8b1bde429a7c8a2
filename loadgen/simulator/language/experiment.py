"""The experiment of ``loadgen sim --experiment tetriinfer``, and traces under the same clusters.

See ``loadgen/simulator/language/points.py`` for what is run.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loadgen.arrivals import FloatArray
from loadgen.simulator.language.arms import burst_arms, check, chosen, steady_arms
from loadgen.simulator.language.cost import COST, OPT_13B_2_V100
from loadgen.simulator.language.decode_only import decode_all
from loadgen.simulator.language.interference import series
from loadgen.simulator.language.link import NVLINK, ROCE
from loadgen.simulator.language.points import (
    STEADY_INSTANCES,
    Task,
    burst,
    dispatch,
    flip,
    prefill,
    reserve,
    steady,
)
from loadgen.simulator.language.requests import ChatRequest, Progress
from loadgen.simulator.language.setups import build
from loadgen.simulator.outcome import summary
from loadgen.simulator.processes import in_processes

GPUS_PER_INSTANCE = 2
_LEVELS = tuple(range(0, 101, 2))


def run_tetriinfer(
    policies: list[str] | None, seeds: int, points: Sequence[str], instances: int | None, workers: int, quick: bool
) -> dict[str, Any]:
    """The experiment's part of the JSON; how far it is goes to standard error.

    Raises:
        UnknownArm: says which clusters there are.
    """
    of_steady = instances or STEADY_INSTANCES
    check(policies, burst_arms() | steady_arms(of_steady))
    makers: dict[str, Callable[[], Iterator[Task]]] = {
        "prefill": lambda: prefill(seeds),
        "burst": lambda: burst(policies, seeds),
        "dispatch": lambda: dispatch(seeds),
        "reserve": lambda: reserve(min(seeds, 5)),
        "steady": lambda: steady(policies, min(seeds, 5), of_steady, quick),
        "flip": lambda: flip(min(seeds, 5)),
    }
    tasks = [task for point in points if point in makers for task in makers[point]()]
    started_s = time.perf_counter()
    runs = _run_all(tasks, workers)
    machine = OPT_13B_2_V100
    return {
        "wall_s": round(time.perf_counter() - started_s, 1),
        "runs": runs,
        "series": [
            {
                "figure": point.figure,
                "what": point.what,
                "count": point.count,
                "paper_ms": point.paper_ms,
                "model_ms": round(point.model_ms(machine.cost), 2),
            }
            for point in (series() if "interference" in points else ())
        ],
    }


def run_trace(
    requests: Sequence[ChatRequest], policies: list[str] | None, instances: int, workers: int
) -> list[dict[str, Any]]:
    """A trace's requests, as they came, under each cluster.

    Raises:
        UnknownArm: says which clusters there are.
    """
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    rate = len(requests) / span_s if span_s else None
    check(policies, steady_arms(instances))
    arms = chosen(steady_arms(instances), policies)
    return _run_all([Task("trace", "trace", setup, 0, tuple(requests), rate) for setup in arms], workers)


# --- runs --------------------------------------------------------------------------------------------------------


def _run_all(tasks: Sequence[Task], workers: int) -> list[dict[str, Any]]:
    """In the order of the tasks, whatever the number of processes."""
    runs = []
    for done, record in enumerate(in_processes(run_task, tasks, workers), 1):
        runs.append(record)
        if done == len(tasks) or done % max(1, len(tasks) // 10) == 0:
            print(f"{done} of {len(tasks)} runs", file=sys.stderr)
    return runs


def run_task(task: Task) -> dict[str, Any]:
    """One run, as the design promises it, with what the paper measures beside it."""
    if task.decode_only:
        return _decode_only(task)
    built = build(task.setup, list(task.requests), task.seed)
    progress = list(built.cluster.run(task.requests).values())
    instances = built.cluster.instances.values()
    resource_s = sum(one.last_busy_s for one in instances)
    flips = built.cluster.control.flipped if built.cluster.control is not None else []
    return {
        **_where(task, len(instances)),
        **_times(progress),
        "resource_s": round(resource_s, 4),
        "gpu_seconds": round(resource_s * GPUS_PER_INSTANCE, 3),
        "padding_tokens": sum(one.padding_tokens for one in instances),
        "transferred_bytes": built.network.sent_bytes,
        "flips": len(flips),
    }


def _decode_only(task: Task) -> dict[str, Any]:
    run = decode_all(task.setup, task.requests, task.seed)
    progress = list(run.progress.values())
    ends = {name: 0.0 for name in run.instances}
    for one in progress:
        ends[one.decoded_by] = max(ends[one.decoded_by], one.end_s)
    slowest = max(ends, key=lambda name: ends[name])
    resource_s = sum(one.last_busy_s for one in run.instances.values())
    heavy, light = run.heavy_light.get(slowest, (0, 0))
    return {
        **_where(task, len(run.instances)),
        **_times(progress),
        "gpu_seconds": round(resource_s * GPUS_PER_INSTANCE, 3),
        "slowest_heavy": heavy,
        "slowest_light": light,
    }


def _where(task: Task, instances: int) -> dict[str, Any]:
    """What the run is of."""
    return {
        "policy": task.setup.name,
        "point": task.point,
        "class": task.of,
        "instances": instances,
        "gpus": instances * GPUS_PER_INSTANCE,
        "rate": task.rate,
        "seed": task.seed,
        "requests": len(task.requests),
    }


def _times(progress: Sequence[Progress]) -> dict[str, Any]:
    ended = [one for one in progress if one.end_s < float("inf")]
    ttft_s = np.asarray([one.ttft_s for one in ended])
    return {
        "completed": len(ended),
        "ttft_s": _rounded(ttft_s),
        "jct_s": _rounded(np.asarray([one.jct_s for one in ended])),
        "tpot_s": _rounded(np.asarray([one.tpot_s for one in ended])),
        "ttft_curve_s": [round(float(value), 3) for value in np.percentile(ttft_s, _LEVELS)],
        "makespan_s": round(max(one.end_s for one in ended), 4),
        "preempted": sum(one.preempted for one in ended),
    }


def _rounded(values: FloatArray) -> dict[str, float]:
    return {name: round(value, 4) for name, value in summary(values).items()}


def language_environment() -> dict[str, Any]:
    """What all runs have in common."""
    machine = OPT_13B_2_V100
    return {
        "model": machine.name,
        "kv_tokens": machine.kv_tokens,
        "kv_token_bytes": machine.kv_token_bytes,
        "cost_s": {name: getattr(COST, name) for name in COST.__slots__},
        "links": {kind.name: {"bytes_per_s": kind.bytes_per_s, "message_s": kind.message_s} for kind in (NVLINK, ROCE)},
    }


def print_language_summary(runs: Sequence[dict[str, Any]]) -> None:
    """Every cluster at every place, for people."""
    places: dict[tuple[str, str, float | None], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        at = places.setdefault((run["point"], run["class"], run["rate"]), {})
        at.setdefault(run["policy"], []).append(run)
    for (point, of, rate), by_policy in places.items():
        print(f"{point}, {of}" + (f", {rate:.2f} requests/s" if rate is not None else ""))
        for policy, of_policy in by_policy.items():
            ttft_s, jct_s = (np.mean([run[name]["mean"] for run in of_policy]) for name in ("ttft_s", "jct_s"))
            print(f"  {policy:28} ttft {ttft_s:7.2f} s  jct {jct_s:7.2f} s")
