"""What the paper measured, beside which ours is put: figure 8, the claims made of it, and figures 12, 13 and 15.

``figure8.json`` has the figure's numbers, read from its curves (to about 0.5 % of an axis): lists by rate, 1 to 5 a
second and instance.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

RATES = (1.0, 2.0, 3.0, 4.0, 5.0)
MODE_RATES = (5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True, slots=True)
class Claim:
    """``setup`` changes a measure against ``base``, at one rate. Said in the paper's text, read from its figure 8."""

    workload: str
    setup: str
    base: str
    measure: str
    statistic: str
    rate: float

    @property
    def text(self) -> str:
        return f"{self.workload} {self.setup} against {self.base}, {self.measure[:-2].upper()} {self.statistic}"


# Not among them: TPOT's P99, which in the figure seems to be over tokens and here is over requests.
CLAIMS = (
    Claim("sharegpt", "1P2D", "PD", "jct_s", "mean", 5.0),
    Claim("sharegpt", "1P2D", "PD", "jct_s", "p99", 4.0),
    Claim("sharegpt", "1P2D-CC", "1P2D", "jct_s", "mean", 5.0),
    Claim("sharegpt", "1P2D-CC", "1P2D", "jct_s", "p99", 5.0),
    Claim("sharegpt", "1P2D-CC", "1P2D", "ttft_s", "mean", 5.0),
    Claim("sharegpt", "1P2D-CC", "1P2D", "ttft_s", "p99", 5.0),
    Claim("sharegpt", "2P1D", "PD", "jct_s", "mean", 1.0),
    Claim("sharegpt", "1P1D", "PD", "jct_s", "mean", 1.0),
    Claim("loogle", "2P1D", "PD", "jct_s", "mean", 5.0),
    Claim("loogle", "1P1D-CC", "1P1D", "jct_s", "mean", 5.0),
    Claim("loogle", "1P1D-CC", "1P1D", "jct_s", "p99", 5.0),
    Claim("loogle", "1P1D-CC", "1P1D", "ttft_s", "mean", 5.0),
    Claim("loogle", "1P1D-CC", "1P1D", "ttft_s", "p99", 4.0),
    Claim("loogle", "PD-CC", "PD", "ttft_s", "mean", 1.0),
    Claim("react", "1P2D", "PD", "jct_s", "mean", 5.0),
    Claim("react", "1P2D", "PD", "jct_s", "p99", 5.0),
    Claim("react", "1P2D-CC", "1P2D", "ttft_s", "mean", 2.0),
    Claim("react", "1P2D-CC", "1P2D", "ttft_s", "p99", 2.0),
    Claim("react", "1P2D-CC", "1P2D", "jct_s", "mean", 2.0),
    Claim("react", "1P2D-CC", "1P2D", "jct_s", "p99", 2.0),
    Claim("react", "PD-CC", "PD", "jct_s", "mean", 4.0),
    Claim("react", "PD-CC", "PD", "ttft_s", "mean", 1.0),
    Claim("react", "1P2D-CC", "PD-CC", "jct_s", "mean", 1.0),
)

# Seconds, P50 and P99 of the time to first token, by share ratio (figure 15).
FIGURE_15: Mapping[int, Mapping[str, tuple[float, float]]] = {
    2: {"round_robin": (0.094, 0.317), "session": (0.045, 0.126), "prompt_tree": (0.043, 0.116)},
    3: {"round_robin": (0.129, 0.316), "session": (0.051, 0.213), "prompt_tree": (0.041, 0.087)},
}
# Seconds, P50 and P99 from arrival to end, by rate 5, 10, 20, 40, 80 (figure 12).
FIGURE_12: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "by_request": ((0.55, 0.72, 2.45, 4.06, 4.96), (0.55, 1.03, 4.56, 7.39, 9.09)),
    "by_layer": ((0.44, 0.68, 3.07, 4.21, 5.02), (0.69, 0.96, 3.92, 7.11, 8.66)),
    "aggregated": ((0.52, 0.72, 2.12, 4.04, 4.76), (0.72, 1.09, 3.84, 6.79, 8.24)),
}
# Per cent of the time to first token without cache, by cached tenths 1 to 10 (figures 13a and 13d).
FIGURE_13A: Mapping[int, tuple[int, ...]] = {
    32: (102, 109, 104, 108, 102, 103, 105, 103, 103, 104),
    128: (102, 103, 102, 105, 103, 103, 102, 100, 105, 102),
    512: (102, 100, 99, 100, 95, 95, 95, 96, 106, 95),
    1024: (107, 104, 92, 89, 76, 74, 68, 67, 64, 65),
    2048: (100, 92, 84, 78, 69, 68, 54, 46, 35, 35),
    4096: (103, 94, 91, 86, 73, 60, 54, 49, 30, 23),
}
FIGURE_13D: Mapping[int, tuple[int, ...]] = {
    1024: (107, 104, 92, 89, 76, 85, 83, 83, 82, 86),
    2048: (102, 96, 91, 87, 79, 81, 69, 63, 54, 57),
    4096: (106, 99, 98, 95, 84, 74, 69, 67, 50, 45),
}


def figure_8() -> dict[tuple[str, str], dict[str, dict[str, list[float]]]]:
    """By workload and setup: measure, statistic, and the values by rate."""
    rows = json.loads(Path(__file__).with_name("figure8.json").read_text(encoding="utf-8"))
    return {(row.pop("workload"), row.pop("setup")): row for row in rows}


def check_claims(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each claim that the runs cover: the change in the paper's figure and in ours, and whether they go one way."""
    paper = figure_8()
    found = []
    for claim in CLAIMS:
        ours = [_mean_of(runs, claim, setup) for setup in (claim.setup, claim.base)]
        if ours[0] is None or ours[1] is None:
            continue
        at = RATES.index(claim.rate)
        theirs = [
            paper[claim.workload, setup][claim.measure][claim.statistic][at] for setup in (claim.setup, claim.base)
        ]
        change, published = ours[0] / ours[1] - 1, theirs[0] / theirs[1] - 1
        found.append(
            {
                "claim": claim.text,
                "rate": claim.rate,
                "paper": published,
                "ours": change,
                "same_sign": (change < 0) == (published < 0),
            }
        )
    return found


def _mean_of(runs: Sequence[Mapping[str, Any]], claim: Claim, setup: str) -> float | None:
    values = [
        run[claim.measure][claim.statistic]
        for run in runs
        if (run["workload"], run["setup"], run["rate"]) == (claim.workload, setup, claim.rate)
    ]
    return fmean(values) if values else None
