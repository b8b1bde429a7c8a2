"""``loadgen sim --experiment memserve`` and ``--trace FILE --format mooncake``: what is run (``tables`` prints it)."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.policies.language.routing_rules import RULES
from common.policies.language.sites import InstanceKind
from loadgen.simulator.memserve import paper, studies
from loadgen.simulator.memserve.machine import PAPER_MACHINE, TRACE_MACHINE, Caching
from loadgen.simulator.memserve.setup import Setup
from loadgen.simulator.memserve.tables import trace_line
from loadgen.simulator.memserve.trace import read_mooncake
from loadgen.simulator.memserve.workloads import WORKLOADS

TRACE_SIZES = (16, 64)
OURS = "added_time"


def run_paper(rules: Sequence[str], requests: int | None, seeds: int | None, quick: bool) -> dict[str, Any]:
    """All studies of the paper's evaluation; how far it is goes to standard error."""
    requests = requests or (60 if quick else studies.REQUESTS)
    seeds = seeds or 1
    rates = (1.0, 5.0) if quick else paper.RATES
    began_s = time.perf_counter()

    def told(what: str) -> None:
        print(f"{what}: {time.perf_counter() - began_s:.0f} s", file=sys.stderr)

    runs: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        runs += studies.end_to_end((workload,), tuple(studies.SETUPS), rates, requests, seeds)
        told(workload)
    scheduling = studies.scheduler_study((2,) if quick else (2, 3), rules or studies.STUDY_RULES, seeds)
    told("scheduler")
    transfers = studies.transfer_study((5.0, 80.0) if quick else paper.MODE_RATES, requests, 0)
    caching = studies.caching_study(requests, 0)
    told("transfers and caching")
    return {
        "runs": runs,
        "claims": paper.check_claims(runs),
        "scheduler": scheduling,
        "transfers": transfers,
        "caching": caching,
        "cached_share": _cached_shares(),
        "wall_s": round(time.perf_counter() - began_s, 1),
    }


def run_trace(
    file: Path, rules: Sequence[str], sizes: Sequence[int], requests: int | None, speed: float
) -> dict[str, Any]:
    """Every rule on the same requests, on clusters of fused instances. Each run says what it took of the processor.

    Raises:
        WrongTrace: the file is none.
    """
    turns = read_mooncake(file, speed)[:requests]
    runs: list[dict[str, Any]] = []
    for size in sizes:
        setup = Setup((InstanceKind.FUSED,) * size, TRACE_MACHINE, Caching.C1)
        for rule in rules or tuple(RULES):
            began_s = time.process_time()
            run, cluster = studies.simulate(setup, turns, rule)
            spent_s = time.process_time() - began_s
            simulated_s = max(one.end_s for one in cluster.asked.values())
            runs.append({"policy": rule, "gpus": size, **run, "simulated_s": simulated_s, "cpu_s": spent_s})
            print(trace_line(runs[-1]), flush=True)
    return {"runs": runs, "verdicts": trace_verdicts(runs)}


def trace_verdicts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours over every other rule, in mean and p99 of both measures: a ratio above 1 is worse."""
    found = []
    for own in (run for run in runs if run["policy"] == OURS):
        for other in runs:
            if other["gpus"] == own["gpus"] and other is not own:
                ratios = {
                    f"{measure} {statistic}": own[measure][statistic] / other[measure][statistic]
                    for measure in ("ttft_s", "jct_s")
                    for statistic in ("mean", "p99")
                }
                found.append({"gpus": own["gpus"], "policy": OURS, "against": other["policy"], "ratios": ratios})
    return found


def _cached_shares() -> list[dict[str, Any]]:
    rows = []
    for medium, figure in (("HBM", paper.FIGURE_13A), ("DRAM", paper.FIGURE_13D)):
        for tokens, published in figure.items():
            ours = [
                100 * studies.cached_share(PAPER_MACHINE, tokens, tenth / 10, medium == "DRAM")
                for tenth in range(1, 11)
            ]
            rows.append({"medium": medium, "prompt_tokens": tokens, "ours": ours, "paper": list(published)})
    return rows
