"""Single runs: one simulated day, and a recorded run's requests once more."""

import time
from collections.abc import Sequence
from typing import Any

from common.policies.video.registry import make_policy
from loadgen.simulator.cost import CostModel
from loadgen.simulator.loop import Cluster, Simulation
from loadgen.simulator.outcome import summary
from loadgen.simulator.points import Point
from loadgen.simulator.recorded import recorded_cluster, recorded_workload
from loadgen.simulator.replay import TimedEvent
from loadgen.workloads import Mix, Pattern, Workload, make_workload, saturation_rate

DAY_S = 86_400.0


def simulate_day(
    policies: Sequence[str], cost: CostModel, gpus: int, mix: Mix, load: float, requests: int | None
) -> list[dict[str, Any]]:
    """One day of Poisson arrivals (or ``requests`` of them) under each policy; prints how long each took."""
    kinds = tuple(cost.rib.profiles)
    rate = load * saturation_rate(cost.rib, kinds, mix, gpus)
    count = requests or max(1, round(rate * DAY_S))
    cluster = Point("day", gpus, mix.name, Pattern.POISSON, rate, load, count).cluster
    runs = []
    for name in policies:
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        workload = make_workload(kinds, mix, Pattern.POISSON, rate, count, seed=0)
        run = _run(name, cluster, workload, cost) | {"rate": rate, "load": load, "mix": mix.name}
        run["wall_s"] = time.perf_counter() - started_s
        run["cpu_s"] = time.process_time() - started_cpu_s
        print(
            f"{name}: {run['makespan_s'] / 3600:.1f} h on {gpus} GPUs at {load:g} of saturation, {count:,} videos, "
            f"{run['events']:,} events in {run['wall_s']:.1f} s ({run['cpu_s']:.1f} s of one core); {_latency(run)}"
        )
        runs.append(run)
    return runs


def simulate_record(policies: Sequence[str], cost: CostModel, recorded: Sequence[TimedEvent]) -> list[dict[str, Any]]:
    """The requests of a recorded run, on its slots, under each policy; ``cost`` is what things took there."""
    workload, cluster = recorded_workload(recorded), recorded_cluster(recorded)
    span_s = float(workload.arrival_s[-1])
    runs = []
    for name in policies:
        run = _run(name, cluster, workload, cost) | {"rate": len(workload) / span_s if span_s else 0.0}
        print(f"{name}: {len(workload)} recorded requests on {cluster.gpus} slots; {_latency(run)}")
        runs.append(run)
    return runs


def _run(policy: str, cluster: Cluster, workload: Workload, cost: CostModel) -> dict[str, Any]:
    outcome = Simulation(make_policy(policy, rib=cost.rib), cluster, workload, cost).run()
    return {
        "policy": policy,
        "gpus": cluster.gpus,
        "seed": 0,
        "requests": len(workload),
        "completed": outcome.completed,
        "latency_s": summary(outcome.latency_s()),
        "gpu_seconds": outcome.total_gpu_seconds(),
        "makespan_s": outcome.makespan_s(),
        "events": outcome.events,
    }


def _latency(run: dict[str, Any]) -> str:
    return f"latency mean {run['latency_s']['mean']:.2f} s, p99 {run['latency_s']['p99']:.2f} s"
