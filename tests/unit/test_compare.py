"""The measuring core of the benchmarks, with a clock that the two sides move themselves."""

import json
from pathlib import Path

import pytest

from loadgen.bench.compare import compare, compare_async, write_json


class HandClock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_ratio_is_taken_pair_by_pair_and_warmup_is_thrown_away() -> None:
    clock, order = HandClock(), []
    # The machine slows down fourfold half-way: medians of each side alone would mislead, the pairs' ratios do not.
    slowness = iter([99.0, 99.0] + [1.0] * 6 + [4.0] * 6)

    def side(name: str, seconds: float) -> None:
        order.append(name)
        clock.now_s += seconds * next(slowness)

    comparison = compare(
        lambda: side("ours", 3.0),
        lambda: side("theirs", 2.0),
        title="both",
        pairs=6,
        warmup=1,
        operations=10,
        clock=clock,
    )
    assert comparison.ratios == pytest.approx([1.5] * 6)
    assert comparison.median_ratio == pytest.approx(1.5)
    assert comparison.quartiles == pytest.approx((1.5, 1.5))
    assert comparison.ours.seconds == pytest.approx([0.3] * 3 + [1.2] * 3)
    assert comparison.theirs.best_s == pytest.approx(0.2)
    assert order[2:6] == ["ours", "theirs", "theirs", "ours"]
    assert "ratio 1.500  (quartiles 1.500 to 1.500, 6 pairs)" in comparison.text()


async def test_coroutines_are_compared_the_same_way(tmp_path: Path) -> None:
    clock = HandClock()
    ours, theirs = iter([9.0, 1.0, 2.0, 3.0, 4.0]), iter([9.0, 1.0, 1.0, 1.0, 1.0])

    async def move(seconds: float) -> None:
        clock.now_s += seconds

    comparison = await compare_async(
        lambda: move(next(ours)), lambda: move(next(theirs)), title="both", pairs=4, warmup=1, clock=clock
    )
    assert comparison.median_ratio == pytest.approx(2.5)
    assert comparison.quartiles == pytest.approx((1.75, 3.25))
    write_json(tmp_path / "out.json", comparison.as_dict())
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["median_ratio"] == pytest.approx(2.5)
    assert written["spread"] == pytest.approx({"first_quartile": 1.75, "third_quartile": 3.25})


@pytest.mark.parametrize(("pairs", "operations"), [(1, 1), (5, 0)])
def test_what_can_give_no_spread_or_no_time_is_refused(pairs: int, operations: int) -> None:
    with pytest.raises(ValueError, match="ask for"):
        compare(int, int, title="nothing", pairs=pairs, operations=operations)
