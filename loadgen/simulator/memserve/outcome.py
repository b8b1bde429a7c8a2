"""What a simulated run came to."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadgen.simulator.language.requests import Progress


@dataclass(slots=True)
class Asked(Progress):
    """What came of a turn. ``asked_s``: when it was, at last; ``best_tokens``: the most of its prompt that any instance
    had then; ``pulled_tokens``: of what it found cached, what came from elsewhere for it."""

    asked_s: float = 0.0
    best_tokens: int = 0
    pulled_tokens: int = 0
    attempts: int = 1

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.asked_s

    @property
    def jct_s(self) -> float:
        return self.end_s - self.asked_s


@dataclass(slots=True)
class Counts:
    """What a cluster counts. ``sent_tokens``: to decode instances, of prompts; ``returned_tokens``: back (C-3);
    ``sent_by_turn``: of each turn's prompt."""

    sent_tokens: int = 0
    returned_tokens: int = 0
    pulled_tokens: int = 0
    pulls: int = 0
    network_calls: int = 0
    repairs: int = 0
    handed_over: int = 0
    sent_by_turn: dict[str, int] = field(default_factory=dict)


def summary(asked: Sequence[Asked], counts: Counts, busy_s: float) -> dict[str, Any]:
    """One run, as ``loadgen``'s JSON has it. ``busy_s``: of all instances; each is taken for one GPU."""
    done = [one for one in asked if one.end_s < float("inf")]
    reads: dict[str, Callable[[Asked], float]] = {
        "ttft": lambda one: one.ttft_s,
        "jct": lambda one: one.jct_s,
        "tpot": lambda one: one.tpot_s,
    }
    prompt = sum(one.request.prompt_tokens for one in done)
    achieved, best = sum(one.cached_tokens for one in done), sum(one.best_tokens for one in done)
    return {
        "requests": len(asked),
        "completed": len(done),
        **{f"{name}_s": _spread([reads[name](one) for one in done]) for name in reads},
        "cache_hit_ratio": achieved / prompt if prompt else 0.0,
        "best_hit_ratio": best / prompt if prompt else 0.0,
        "gpu_seconds": busy_s,
        "sent_tokens": counts.sent_tokens,
        "returned_tokens": counts.returned_tokens,
        "pulls": counts.pulls,
        "pulled_tokens": counts.pulled_tokens,
        "network_calls": counts.network_calls,
        "handed_over": counts.handed_over,
        "repairs": counts.repairs,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "mean": statistics.fmean(ordered),
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": ordered[-1],
    }
