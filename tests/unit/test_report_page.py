"""The page: self-contained, well-formed, and everything on it labelled and marked as simulated."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.report.charts import Line, bar_chart, cdf_chart, line_chart
from loadgen.report.scales import Scale, label, log_range
from loadgen.report.sections import losses
from loadgen.simulator.verdicts import table_of

VOID = {"meta", "br", "link", "img"}


class Balance(HTMLParser):
    """Notes tags that are closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    common = ("--gpus", "8", "--mix", "even", "bimodal", "--seeds", "3", "--requests", "30", "--quick")
    names = (["ddit", "sdop:1", "sdop:2", "sdop:4"], ["ddit-no-promotion", "ddit-no-decoupling", "spci", "dpci"])
    for number, policies in enumerate(names):
        main(["sim", "--policy", *policies, *common, "--json", str(folder / f"{number}.json")])
    main(["report", str(folder / "0.json"), str(folder / "1.json"), "-o", str(folder / "report.html")])
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"https?:|<link|@import|url\(|src=", page)


def test_it_is_marked_as_simulated(page: str) -> None:
    assert '<span class="badge">simulated</span>' in page


def test_tags_balance(page: str) -> None:
    balance = Balance()
    balance.feed(page)
    assert balance.wrong == [] and balance.open == []


def test_every_drawing_is_well_formed_and_has_its_numbers(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing and "inf" not in drawing.replace("information", "")


def test_every_chart_names_its_axes_with_units(page: str) -> None:
    axes = set(re.findall(r'<text class="axis"[^>]*>([^<]*)</text>', page))
    assert {"load (share of saturation)", "mean latency (s)", "p99 latency (s)", "latency (s)", "time (s)"} <= axes
    assert {"slot (GPU)", "requests done (%)", "cost over the bound"} <= axes


def test_the_papers_cases_stand_beside_ours(page: str) -> None:
    assert "single node, rate 0.25" in page and "−12.88 %" in page
    assert "without DoP promotion, up to" in page


def test_a_loss_says_what_the_winner_comes_to_by_the_other_measure() -> None:
    where = {"point": "sweep", "gpus": 8, "mix": "even", "load": 1.2, "rate": 1.0}
    latencies = {"elastic": (12.0, 20.0, 30.0), "srtf": (10.0, 50.0, 60.0), "ddit": (30.0, 20.0, 25.0)}
    runs = [
        {**where, "policy": policy, "seed": seed, "latency_s": {"mean": mean, "p99": p99, "max": most}}
        for policy, (mean, p99, most) in latencies.items()
        for seed in range(3)
    ]
    text = losses(table_of(runs))
    assert "worse than the best other policy in 1 means and p99s, at 1 points" in text
    assert "mean 12.00 s against 10.00 s of srtf" in text and "the p99 of srtf is 2.500 (2.500 to 2.500) times" in text


def test_a_line_that_runs_away_leaves_the_frame_once() -> None:
    drawing = line_chart("t", [Line("a", [(0, 1.0), (1, 2.0), (2, 1e6), (3, 1e7)])], "x", "y (s)")
    points = re.search(r'polyline points="([^"]*)"', drawing)
    assert points is not None and len(points.group(1).split()) == 3


def test_bars_and_distributions_draw() -> None:
    ElementTree.fromstring(bar_chart("t", [("a<b", 1.5), ("c", 0.5)], "cost", 1.0))
    ElementTree.fromstring(cdf_chart("t", [Line("a", [(1.0, 0), (2.0, 50), (9.0, 100)])], "latency (s)"))


def test_ticks_are_round_and_few() -> None:
    assert Scale(0.1, 1.2, 0, 100).ticks() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    assert Scale(3, 60, 0, 100, log=True).ticks() == [5, 10, 20, 50]
    assert [label(value) for value in (1000.0, 0.5, 20.0)] == ["1,000", "0.5", "20"]
    assert log_range([1, 10_000]) == pytest.approx((0.85, 10**2.2))


@pytest.mark.parametrize(("content", "message"), [("nonsense", "is not JSON"), ("{}", "has no 'environment'")])
def test_a_wrong_file_gets_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        main(["report", str(file)])


def test_a_missing_file_gets_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["report", str(tmp_path / "none.json")])


def test_different_profiles_are_not_mixed(tmp_path: Path) -> None:
    for number, step in enumerate(("0.25", "0.15")):
        out = str(tmp_path / f"{number}.json")
        main(
            [
                "sim",
                "--quick",
                "--policy",
                "fifo",
                "--mix",
                "even",
                "--requests",
                "5",
                "--step-240p",
                step,
                "--json",
                out,
            ]
        )
    assert json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))["runs"]
    with pytest.raises(SystemExit, match="different profiles"):
        main(["report", str(tmp_path / "0.json"), str(tmp_path / "1.json")])
