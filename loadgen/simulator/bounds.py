"""Each policy's cost over the paper's lower bound. What "cost" means is not in the paper's account; here it is this.

*Batch* (everything at once), in the unit of the bound, GPU-seconds:
  ``held``: what the requests held, idle or working, as the bound counts rounds of work and no idle GPU;
  ``rented``: all GPUs from the first arrival to the last end, as a bill for the machines would count.
*Online* (Poisson): the bound is the sum over classes of block size times mean time from arrival to end. A policy is
  charged the same way, with the block sizes of the bound's own plan and its measured mean latency of each class. A
  policy that shares GPUs between classes can fall below 1: the plan isolates them and leaves GPUs unused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.policies.video.rib import Rib
from loadgen.simulator.lower_bound import Bound, Halving, OccupiedTime, batch_time, lower_bound, online_time
from loadgen.simulator.points import Point
from loadgen.simulator.statistics import mean_estimate
from loadgen.simulator.verdicts import Series
from loadgen.workloads import STEPS, Pattern, mix_named


@dataclass(frozen=True, slots=True)
class Problem:
    """The bound's inputs at one point: the classes that occur, their shares and their execution times by degree."""

    numbers: tuple[int, ...]
    shares: tuple[float, ...]
    service_s: tuple[dict[int, float], ...]


def problem_of(rib: Rib, mix: str, degrees: tuple[int, ...]) -> Problem:
    """Classes of share zero are left out: the programme would have to give them a block."""
    shares = mix_named(mix).shares()
    numbers = tuple(number for number, share in enumerate(shares) if share > 0)
    kinds = tuple(rib.profiles)
    service_s = tuple(
        {degree: STEPS * rib.step_s(kinds[number], degree) + rib.decode_s(kinds[number]) for degree in degrees}
        for number in numbers
    )
    return Problem(numbers, tuple(float(shares[number]) for number in numbers), service_s)


def bounds_at(rib: Rib, point: Point) -> dict[str, Any] | None:
    """The bound at a point as the JSON holds it; None where no fixed partition carries the load."""
    cluster = point.cluster
    degrees = tuple(degree for degree in rib.degrees if degree <= cluster.slots)
    problem = problem_of(rib, point.mix, degrees)
    found: dict[str, Any] = {
        "point": point.name,
        "gpus": point.gpus,
        "mix": point.mix,
        "rate": round(point.rate, 6),
        "load": round(point.load, 4),
    }

    def solve(occupied: OccupiedTime) -> Bound:
        return lower_bound(cluster.gpus, len(problem.shares), degrees, cluster.slots, occupied)

    try:
        if point.pattern is Pattern.BURST:
            bound = solve(batch_time(point.requests, problem.shares, problem.service_s))
            return found | {"batch": _as_dict(bound, problem)}
        if point.pattern is Pattern.POISSON:
            for halving in Halving:
                bound = solve(online_time(point.rate, problem.shares, problem.service_s, halving))
                found[f"online_{halving.value}"] = _as_dict(bound, problem)
            return found
    except ValueError:
        return None
    return None


def cost_over(series: Series, bound: Mapping[str, Any]) -> dict[str, float]:
    """A policy's cost over each bound there is at its point, the mean over seeds, by the name of the cost."""
    costs = {}
    if "batch" in bound:
        least = bound["batch"]["gpu_seconds"]
        costs["held"] = mean_estimate([run["gpu_seconds"] / least for run in series.runs]).value
        costs["rented"] = mean_estimate([run["makespan_s"] * run["gpus"] / least for run in series.runs]).value
    for name in ("online_usual", "online_reported"):
        if name in bound:
            costs[name] = _online_cost(series, bound[name]) / bound[name]["gpu_seconds"]
    return costs


def _online_cost(series: Series, plan: Mapping[str, Any]) -> float:
    """The plan's block sizes times the policy's own mean latencies, all seeds' requests weighing alike."""
    total = 0.0
    for block in plan["blocks"]:
        number = block["class"]
        weights = [run["class_requests"][number] for run in series.runs]
        means = [run["class_latency_s"][number] or 0.0 for run in series.runs]
        total += block["gpus"] * float(np.average(means, weights=weights))
    return total


def _as_dict(bound: Bound, problem: Problem) -> dict[str, Any]:
    blocks = [
        {
            "class": number,
            "gpus": block.gpus,
            "degree": block.degree,
            "groups": block.groups,
            "occupied_s": round(block.occupied_s, 4),
        }
        for number, block in zip(problem.numbers, bound.blocks, strict=True)
    ]
    return {"gpu_seconds": round(bound.gpu_seconds, 4), "blocks": blocks}
