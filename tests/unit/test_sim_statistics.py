"""Intervals and verdicts: known values, and who wins when."""

import math
from typing import Any

import pytest

from loadgen.simulator.statistics import mean_estimate, ratio_estimate, student_t
from loadgen.simulator.verdicts import Result, against_best, table_of


@pytest.mark.parametrize(("freedom", "value"), [(2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (1000, 1.962)])
def test_students_t_is_the_tables(freedom: int, value: float) -> None:
    assert student_t(freedom) == pytest.approx(value, rel=0.01)


def test_a_mean_has_its_interval() -> None:
    estimate = mean_estimate([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.high) == (2.0, pytest.approx(2 + 4.303 / math.sqrt(3)))
    assert mean_estimate([5.0]).low == 5.0


def test_a_ratio_is_paired() -> None:
    # Each pair has the ratio 1/2 exactly, however much the seeds differ.
    estimate = ratio_estimate([1.0, 10.0, 100.0], [2.0, 20.0, 200.0])
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.5, 0.5, 0.5))


def _run(policy: str, seed: int, seconds: float) -> dict[str, Any]:
    where = {"point": "sweep", "gpus": 8, "mix": "even", "load": 0.5, "rate": 0.4}
    return {**where, "policy": policy, "seed": seed, "latency_s": {"mean": seconds, "p99": 2 * seconds}}


@pytest.mark.parametrize(("own", "result"), [(0.8, Result.BETTER), (1.0, Result.EVEN), (1.2, Result.WORSE)])
def test_the_rival_is_the_best_of_the_others(own: float, result: Result) -> None:
    wobble = (0.99, 1.0, 1.01)
    runs = [_run("ours", seed, own * factor) for seed, factor in enumerate(wobble)]
    runs += [_run("good", seed, factor) for seed, factor in enumerate(reversed(wobble))]
    runs += [_run("bad", seed, 5.0) for seed in range(3)]
    verdicts = against_best(table_of(runs), "ours")
    assert [(verdict.measure, verdict.other, verdict.result) for verdict in verdicts] == [
        ("mean", "good", result),
        ("p99", "good", result),
    ]
    assert against_best(table_of(runs), "ours", ("bad",))[0].result is Result.BETTER
