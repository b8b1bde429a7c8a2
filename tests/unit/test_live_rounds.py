"""``loadgen bench ddit-live`` without its stack: ratios, verdicts, parity, and one clear line for mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.policies.video.decisions import Decision
from common.policies.video.elastic import Elastic
from common.policies.video.events import JobArrived
from common.policies.video.rib import KindProfile, Rib, VideoKind
from loadgen.__main__ import benchmarks, main
from loadgen.bench.parity import Parity, parities, simulated
from loadgen.bench.rounds import Ratio, Readings, comparison, lines, spread
from loadgen.bench.series import Series, WrongSeries, read_series
from loadgen.workloads import Workload

KIND = VideoKind(64, 64, 16)
RIB = Rib({KIND: KindProfile({1: 0.1, 2: 0.06}, decode_s=0.5)})
# Two videos of ten steps, the second half a second after the first.
WORKLOAD = Workload((KIND,), np.array([0, 0]), np.array([0.0, 0.5]), (10, 10))


def readings() -> Readings:
    slow = [[2.0, 4.0], [3.0, 5.0], [2.0, 2.0]]
    return Readings({"sdop:1": slow, "sdop:2": [[4.0, 8.0]] * 3, "ddit": [[x / 2 for x in row] for row in slow]})


def test_ratios_are_taken_round_by_round() -> None:
    assert readings().ratio("ddit", "sdop:1", "mean") == Ratio(0.5, 0.5, 0.5, 3)
    ratio = readings().ratio("sdop:1", "sdop:2", "mean")
    assert ratio.median == pytest.approx(0.5) and ratio.first == pytest.approx((1 / 3 + 0.5) / 2)


def test_the_better_static_choice_is_the_one_whose_typical_round_is_better() -> None:
    assert readings().better_static("mean") == readings().better_static("p99") == "sdop:1"
    assert Readings({"ddit": [[1.0]]}).better_static("mean") is None


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(0.9, 0.8, 0.95, 5), "better"),
        (Ratio(0.99, 0.9, 1.1, 5), "no worse"),
        (Ratio(1.01, 0.99, 1.1, 5), "no worse"),
        (Ratio(1.1, 1.05, 1.2, 5), "WORSE"),
    ],
)
def test_a_verdict_goes_by_the_spread(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict == verdict


def test_one_round_has_no_spread() -> None:
    assert spread([0.7]) == Ratio(0.7, 0.7, 0.7, 1)


def test_the_lines_compare_each_with_each_and_with_the_better_static_choice() -> None:
    text = lines(readings())
    assert text[1].split() == ["sdop:1", "3.00s", "4.95s"]
    assert "ddit   over sdop:2  mean 0.250" in "\n".join(text)
    assert text[-2] == "ddit against the better static choice, by mean: 0.500 (0.500 to 0.500) of sdop:1: better"
    assert comparison(readings(), "ddit", "sdop:1")["p99"] == {
        "median_ratio": 0.5,
        "spread": {"first_quartile": 0.5, "third_quartile": 0.5},
        "verdict": "better",
    }


def test_everybody_begins_once() -> None:
    series = Series(("a", "b", "c"), RIB, "", 2, 10, 4, 0.6, "even", 7)
    assert [series.turn(number) for number in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_a_series_goes_on_where_it_ended(tmp_path: Path) -> None:
    series = Series(("ddit", "sdop:1"), RIB, "", 2, 10, 2, 0.6, "even", 7)
    rounds = {"ddit": [[1.0, 2.0]], "sdop:1": [[3.0, 4.0]]}
    runs = [
        {"policy": policy, "seed": 7 + number, "latencies_s": latencies}
        for policy, all_of_it in rounds.items()
        for number, latencies in enumerate(all_of_it)
    ]
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"series": series.as_dict(), "runs": runs}))
    again, readings = read_series(file)
    assert (again, readings.rounds, readings.count) == (series, rounds, 1)
    more = readings.with_round({"ddit": [5.0], "sdop:1": [6.0]})
    assert more.rounds == {"ddit": [[1.0, 2.0], [5.0]], "sdop:1": [[3.0, 4.0], [6.0]]} and readings.count == 1
    first, second = series.workload(0), again.workload(1)
    assert len(first) == len(second) == 2 and list(first.arrival_s) != list(second.arrival_s)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"series": {"rib": {}}, "runs": []}'])
def test_a_file_that_is_no_series_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(content)
    with pytest.raises(WrongSeries, match="was not written by ddit-live --json"):
        read_series(file)


def test_the_simulator_answers_for_the_same_requests() -> None:
    # Each on a slot of its own: ten steps and the decoding.
    assert simulated("sdop:1", WORKLOAD, RIB, 2) == pytest.approx([1.5, 1.5], abs=0.01)
    # One group: the second waits until the first is decoded.
    assert simulated("sdop:2", WORKLOAD, RIB, 2) == pytest.approx([1.1, 1.7], abs=0.01)


def test_the_simulator_hears_the_warm_up_and_leaves_it_out_of_what_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    arrived = Elastic._arrived

    def listening(policy: Elastic, event: JobArrived, now_s: float) -> list[Decision] | None:
        heard.append(now_s)
        return arrived(policy, event, now_s)

    monkeypatch.setattr(Elastic, "_arrived", listening)
    assert len(simulated("elastic", WORKLOAD, RIB, 2)) == len(WORKLOAD)
    assert len(heard) == 2 * len(WORKLOAD.kinds) + len(WORKLOAD) and heard == sorted(heard)


def test_parity_is_kept_within_what_is_promised() -> None:
    found = parities({"sdop:1": [[1.6, 1.6], [1.6, 3.2]]}, [WORKLOAD, WORKLOAD], RIB, 2)
    by_measure = {parity.measure: parity for parity in found}
    assert by_measure["mean"].off == pytest.approx(1.5 / 2.0 - 1, abs=0.01) and not by_measure["mean"].kept
    assert by_measure["p99"].text.endswith("promised within 25 %: NOT kept")
    assert Parity("ddit", "mean", 1.14, 1.0).kept and Parity("ddit", "p99", 0.76, 1.0).kept
    assert not Parity("ddit", "mean", 1.16, 1.0).kept


def test_the_benchmark_is_found_by_its_name() -> None:
    assert "ddit-live" in benchmarks() and "ddit_live" not in benchmarks()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--requests", "1"], "--requests 1: give 2 or more"),
        (["--load", "0"], "--load 0: give a share of saturation above 0"),
        (["--policy", "nonsense"], "no policy is called 'nonsense'"),
        (["--mix", "odd"], "no mix is called 'odd'"),
        (["--rib", "nowhere.json"], "--rib nowhere.json: there is no such file; triptych profile writes one"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "ddit-live", *arguments])
    assert str(refusal.value).startswith(f"loadgen bench ddit-live: {message}")
