"""The studies of MemServe's evaluation: which clusters meet which requests, and what is read off."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from common.policies.language.routing_rules import make_rule
from common.policies.language.sites import InstanceKind
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.memserve.cluster import Cluster
from loadgen.simulator.memserve.machine import (
    PAPER_MACHINE,
    Caching,
    Machine,
    TransferMode,
    Transfers,
)
from loadgen.simulator.memserve.outcome import summary
from loadgen.simulator.memserve.setup import Setup
from loadgen.simulator.memserve.turns import Turn
from loadgen.simulator.memserve.workloads import LOOGLE, SHAREGPT, WORKLOADS, alike, make_turns, repeated

# By instance: the paper does not say. The more, the further an overloaded cluster falls behind.
REQUESTS = 150
STUDY_SESSIONS, STUDY_TURNS, STUDY_RATE = 80, 3, 25.0
STUDY_RULES = ("round_robin", "least_load", "session", "prompt_tree", "cost", "dynamo", "added_time")

_P, _D, _PD = InstanceKind.PREFILL, InstanceKind.DECODE, InstanceKind.FUSED
# Figure 8's settings. Fused ones are compared with as many instances as those taken apart have: three.
SETUPS: dict[str, Setup] = {
    "PD": Setup((_PD,) * 3, PAPER_MACHINE, Caching.NONE),
    "PD-CC": Setup((_PD,) * 3, PAPER_MACHINE, Caching.C1),
    "1P1D": Setup((_P, _D), PAPER_MACHINE, Caching.NONE),
    "1P1D-CC": Setup((_P, _D), PAPER_MACHINE, Caching.C3),
    "1P2D": Setup((_P, _D, _D), PAPER_MACHINE, Caching.NONE),
    "1P2D-CC": Setup((_P, _D, _D), PAPER_MACHINE, Caching.C3),
    "2P1D": Setup((_P, _P, _D), PAPER_MACHINE, Caching.NONE),
    "2P1D-CC": Setup((_P, _P, _D), PAPER_MACHINE, Caching.C3),
}


def simulate(setup: Setup, turns: Iterable[Turn], rule: str, seed: int = 0) -> tuple[dict[str, Any], Cluster]:
    """One run: its part of the JSON, and the cluster for whoever wants to know more."""
    cluster = Cluster(Clock(), setup, make_rule(rule), seed)
    asked = cluster.run(turns)
    busy_s = sum(engine.busy_s for engine in cluster.engines.values())
    return summary(list(asked.values()), cluster.counts, busy_s), cluster


def end_to_end(
    workloads: Sequence[str], setups: Sequence[str], rates: Sequence[float], requests: int, seeds: int
) -> list[dict[str, Any]]:
    """Figure 8: rates are by instance, routing goes by prompt trees, transfers are by request and aggregated."""
    runs = []
    for workload in workloads:
        for name in setups:
            setup, size = SETUPS[name], len(SETUPS[name].kinds)
            rule = "round_robin" if setup.caching is Caching.NONE else "prompt_tree"
            for rate in rates:
                for seed in range(seeds):
                    turns = make_turns(WORKLOADS[workload], requests * size, rate * size, seed)
                    run, _ = simulate(setup, turns, rule, seed)
                    runs.append(
                        {"workload": workload, "setup": name, "policy": rule, "rate": rate, "seed": seed, **run}
                    )
    return runs


def scheduler_study(ratios: Sequence[int], rules: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Figure 15: LooGLE's sessions on 3P1D, the whole set asked ``ratio`` times."""
    setup = Setup((_P, _P, _P, _D), PAPER_MACHINE, Caching.C3)
    runs = []
    for ratio in ratios:
        for rule in rules:
            for seed in range(seeds):
                turns = repeated(LOOGLE, STUDY_SESSIONS, STUDY_TURNS, ratio, STUDY_RATE, seed)
                run, _ = simulate(setup, turns, rule, seed)
                runs.append({"share_ratio": ratio, "policy": rule, "seed": seed, **run})
    return runs


def transfer_study(rates: Sequence[float], requests: int, seed: int) -> list[dict[str, Any]]:
    """Figure 12: prompts of 1,024 tokens and answers of 32, on 1P1D."""
    runs = []
    for mode in TransferMode:
        setup = Setup((_P, _D), PAPER_MACHINE, Caching.NONE, Transfers(mode))
        for rate in rates:
            run, _ = simulate(setup, alike(requests, 1024, 32, rate, seed), "least_load", seed)
            runs.append({"mode": mode.value, "rate": rate, **run})
    return runs


def caching_study(requests: int, seed: int) -> list[dict[str, Any]]:
    """PD-Caching-1 to 3 by the turn of a conversation (figure 4): what the prefill instance computes, what is sent."""
    rows = []
    for caching in Caching:
        setup = replace(SETUPS["1P1D"], caching=caching)
        _, cluster = simulate(setup, make_turns(SHAREGPT, requests, 2.0, seed), "prompt_tree", seed)
        by_turn: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for name, asked in cluster.asked.items():
            prompt = asked.request.prompt_tokens
            place = int(name.rsplit(".", 1)[1])
            by_turn[place].append((prompt, prompt - asked.cached_tokens, cluster.counts.sent_by_turn.get(name, 0)))
        for turn, found in sorted(by_turn.items()):
            means = [fmean(column) for column in zip(*found, strict=True)]
            rows.append(
                {
                    "caching": caching.name,
                    "turn": turn + 1,
                    "requests": len(found),
                    "prompt_tokens": means[0],
                    "computed_tokens": means[1],
                    "sent_tokens": means[2],
                }
            )
    return rows


def cached_share(machine: Machine, prompt_tokens: int, share: float, in_dram: bool) -> float:
    """Figure 13: time to first token with so much cached, of that without, both with what no cache saves."""
    cached = min(round(prompt_tokens * share), prompt_tokens - 1)
    swap_s = cached * machine.kv_token_bytes / machine.swap_bytes_per_s if in_dram else 0.0
    return (machine.prefill.exec_s(prompt_tokens, cached) + swap_s) / machine.prefill.exec_s(prompt_tokens, 0)
