"""What bursts came to under each system, and the paper's figures made of them (TetriInfer, section 5.1)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadgen.bench.instance_use import Use
from loadgen.bench.rounds import Ratio, spread
from loadgen.simulator.language.verdicts import Against
from loadgen.simulator.outcome import summary

_PARTS = ("mean", "p50", "p90", "p99")
# Widths of columns.
_NAME, _CELL = 24, 19


@dataclass(frozen=True)
class Burst:
    """One class's requests, all asked at once: seconds from then until each first and each last token."""

    ttft_s: Sequence[float]
    jct_s: Sequence[float]
    answer_tokens: Sequence[int]
    uses: Mapping[str, Use]

    @property
    def resource_s(self) -> float:
        """What the paper calls resource usage time: how long each instance is needed, from the burst's beginning.

        By its figures 11 to 15 that is the last first token and the last token of all.
        """
        return sum(use.last_s for use in self.uses.values())

    @property
    def used_s(self) -> float:
        """The same from each instance's first use on, as three of the paper's bars have it."""
        return sum(use.last_s - use.first_s for use in self.uses.values())

    @property
    def cpu_s(self) -> float:
        """The instances' processor time."""
        return sum(use.cpu_s for use in self.uses.values())

    @property
    def tokens_s(self) -> float:
        """Tokens of answers a second, until the last of all."""
        return sum(self.answer_tokens) / max(self.jct_s)

    @property
    def tpot_s(self) -> list[float]:
        """Of each answer, the seconds between two tokens after the first."""
        return [
            (jct - ttft) / max(1, tokens - 1)
            for ttft, jct, tokens in zip(self.ttft_s, self.jct_s, self.answer_tokens, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        times = {"ttft_s": self.ttft_s, "jct_s": self.jct_s, "tpot_s": self.tpot_s}
        return {
            "requests": len(self.jct_s),
            "completed": len(self.jct_s),
            **{name: summary(np.asarray(values)) for name, values in times.items()},
            "makespan_s": max(self.jct_s),
            "resource_s": self.resource_s,
            "used_s": self.used_s,
            "cpu_s": self.cpu_s,
            "tokens_s": self.tokens_s,
            "uses": {name: vars(use) for name, use in self.uses.items()},
            "ttfts_s": list(self.ttft_s),
            "jcts_s": list(self.jct_s),
        }


def against(ours: Burst, base: Burst) -> Against:
    """The paper's comparison of two bursts of the same requests."""
    return Against(
        1 - statistics.fmean(ours.ttft_s) / statistics.fmean(base.ttft_s),
        1 - statistics.fmean(ours.jct_s) / statistics.fmean(base.jct_s),
        ours.resource_s / base.resource_s,
    )


def _part(of: Sequence[float], part: str) -> float:
    return summary(np.asarray(of))[part]


# Each as a ratio to another system's. Below 1 is better, but for the last three.
RATIOS: dict[str, Callable[[Burst, Burst], float]] = {
    "TTFT mean": lambda ours, base: 1 - against(ours, base).ttft_cut,
    "TTFT p99": lambda ours, base: _part(ours.ttft_s, "p99") / _part(base.ttft_s, "p99"),
    "JCT mean": lambda ours, base: 1 - against(ours, base).jct_cut,
    "JCT p99": lambda ours, base: _part(ours.jct_s, "p99") / _part(base.jct_s, "p99"),
    "resources": lambda ours, base: against(ours, base).resources,
    "from first use": lambda ours, base: ours.used_s / base.used_s,
    "tok/s": lambda ours, base: ours.tokens_s / base.tokens_s,
    "perf/$": lambda ours, base: against(ours, base).perf_per_dollar,
    "speed-up/cost": lambda ours, base: against(ours, base).usual,
}


@dataclass
class Readings:
    """By class and system each round's burst; round i of all systems had the same requests."""

    rounds: dict[str, dict[str, list[Burst]]] = field(default_factory=dict)

    def add(self, of: str, system: str, burst: Burst) -> None:
        """Take in one burst."""
        self.rounds.setdefault(of, {}).setdefault(system, []).append(burst)

    def ratio(self, of: str, ours: str, base: str, name: str) -> Ratio:
        """Round by round."""
        pairs = zip(self.rounds[of][ours], self.rounds[of][base], strict=True)
        return spread([RATIOS[name](mine, other) for mine, other in pairs])

    def lines(self, of: str, bases: Sequence[str]) -> list[str]:
        """A class's tables for people: medians over the rounds, and ratios, round by round, with their quartiles."""
        by_system = self.rounds[of]
        head = "".join(f"{name:>9}" for times in ("TTFT", "JCT") for name in (f"{times} mean", *_PARTS[1:]))
        found = [f"  {'seconds':<{_NAME}}{head}{'resource':>10}{'used':>8}{'CPU':>8}{'tok/s':>8}"]
        found += [f"  {name:<{_NAME}}{_row(bursts)}" for name, bursts in by_system.items()]
        for base in (one for one in bases if one in by_system):
            found.append(f"  {f'over {base}':<{_NAME}}{''.join(f'{name:>{_CELL}}' for name in RATIOS)}")
            found += [f"  {name:<{_NAME}}{self._over(of, name, base)}" for name in by_system if name != base]
        return found

    def _over(self, of: str, system: str, base: str) -> str:
        ratios = [self.ratio(of, system, base, name) for name in RATIOS]
        return "".join(f"{f'{one.median:.2f} ({one.first:.2f}-{one.third:.2f})':>{_CELL}}" for one in ratios)

    def comparisons(self, bases: Sequence[str]) -> list[dict[str, object]]:
        """For ``--json``: every system over each base."""
        return [
            {
                "class": of,
                "ours": system,
                "theirs": base,
                "ratios": {name: vars(self.ratio(of, system, base, name)) for name in RATIOS},
            }
            for of, by_system in self.rounds.items()
            for base in bases
            for system in by_system
            if base in by_system and system != base
        ]


def _row(bursts: Sequence[Burst]) -> str:
    """Medians over the rounds."""
    times = [
        statistics.median(_part(values, part) for values in of_round)
        for of_round in ([one.ttft_s for one in bursts], [one.jct_s for one in bursts])
        for part in _PARTS
    ]
    resource_s, used_s, cpu_s, tokens_s = (
        statistics.median(getattr(one, name) for one in bursts)
        for name in ("resource_s", "used_s", "cpu_s", "tokens_s")
    )
    return "".join(f"{value:9.3f}" for value in times) + f"{resource_s:10.2f}{used_s:8.2f}{cpu_s:8.2f}{tokens_s:8.0f}"
