"""What servers of language models were measured at, round by round, and what a comparison of two comes to."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadgen.bench.rounds import Ratio, spread

# What the client reports, what it is called here, and whether more of it is better.
MEASURES = {
    "output_throughput": ("output tok/s", True),
    "median_ttft_ms": ("TTFT p50 ms", False),
    "p99_ttft_ms": ("TTFT p99 ms", False),
    "median_tpot_ms": ("TPOT p50 ms", False),
    "p99_tpot_ms": ("TPOT p99 ms", False),
}


@dataclass(frozen=True, order=True)
class Workload:
    """Prompts of ``prompt_tokens`` random tokens, answers of ``output_tokens``, ``concurrency`` at a time."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int

    @property
    def text(self) -> str:
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.concurrency} at a time"


@dataclass
class Readings:
    """By workload and server, each round's measures; round i of all servers had the same requests."""

    rounds: dict[Workload, dict[str, list[dict[str, float]]]] = field(default_factory=dict)

    def add(self, workload: Workload, server: str, result: Mapping[str, Any]) -> None:
        """Take in what the client reported of one run."""
        measures = {name: float(result[name]) for name in MEASURES}
        self.rounds.setdefault(workload, {}).setdefault(server, []).append(measures)

    def median(self, workload: Workload, server: str, measure: str) -> float:
        return statistics.median(one[measure] for one in self.rounds[workload][server])

    def ratio(self, workload: Workload, ours: str, theirs: str, measure: str) -> Ratio:
        """How many times as good we are, round by round: below 1, ours is the better one, as with times."""
        pairs = zip(self.rounds[workload][ours], self.rounds[workload][theirs], strict=True)
        more_is_better = MEASURES[measure][1]
        return spread(
            [
                other[measure] / mine[measure] if more_is_better else mine[measure] / other[measure]
                for mine, other in pairs
            ]
        )

    def lines(self, servers: Sequence[str], reference: str | None) -> list[str]:
        """A table for people: each server's medians, and the ratio to the reference with its quartiles."""
        found = []
        for workload in sorted(self.rounds):
            count = len(next(iter(self.rounds[workload].values())))
            found.append(f"{workload.text}, {workload.requests} requests, {count} rounds")
            for measure, (name, _) in MEASURES.items():
                cells = [f"{server} {self.median(workload, server, measure):9.1f}" for server in servers]
                cells += self._verdicts(workload, servers, reference, measure)
                found.append(f"  {name:<13} " + "  ".join(cells))
        return found

    def _verdicts(self, workload: Workload, servers: Sequence[str], reference: str | None, measure: str) -> list[str]:
        if reference is None:
            return []
        ratios = {server: self.ratio(workload, server, reference, measure) for server in servers if server != reference}
        return [f"{server}/{reference} {ratio.text} {ratio.verdict}" for server, ratio in ratios.items()]

    def as_dicts(self, servers: Sequence[str], reference: str | None) -> list[dict[str, object]]:
        """For ``--json``: every reading, and the ratios."""
        return [
            {
                **vars(workload),
                "rounds": by_server,
                "ratios": {
                    server: {measure: vars(self.ratio(workload, server, reference, measure)) for measure in MEASURES}
                    for server in servers
                    if reference is not None and server != reference
                },
            }
            for workload, by_server in sorted(self.rounds.items())
        ]
