"""``loadgen sim`` for language: the promised JSON, traces, the page, and one clear line for mistakes."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from loadgen.__main__ import main
from loadgen.simulator.language.workloads import WrongTrace, azure_requests
from tests.unit.test_report_page import Balance

BURST = (
    "--experiment",
    "tetriinfer",
    "--point",
    "interference",
    "prefill",
    "burst",
    "dispatch",
    "reserve",
    "--seeds",
    "1",
)
FEW = ("--policy", "coupled-16", "coupled-x2", "tetriinfer", "fluid")
# Of the form of Azure's, with numbers of our own.
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-02-01 10:{2 * number // 60:02d}:{2 * number % 60:02d}.{number:07d},"
    f"{300 + 37 * number % 900},{5 + 13 * number % 150}\n"
    for number in range(45)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the JSON of a few points and of a trace."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    assert main(["sim", *BURST, *FEW, "--json", str(folder / "burst.json")]) == 0
    assert main(["sim", "--trace", str(folder / "trace.csv"), "--gpus", "8", "--json", str(folder / "trace.json")]) == 0
    return folder


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_the_json_has_what_is_promised(folder: Path) -> None:
    data = _read(folder / "burst.json")
    assert data["environment"]["simulated"] is True
    assert {run["point"] for run in data["runs"]} == {"prefill", "burst", "dispatch", "reserve"}
    assert {run["policy"] for run in data["runs"] if run["point"] == "burst"} == set(FEW[1:])
    for run in data["runs"]:
        assert {"policy", "rate", "seed", "requests", "completed", "gpu_seconds", "instances"} <= set(run)
        assert run["completed"] == run["requests"]
        for measure in ("ttft_s", "jct_s", "tpot_s"):
            assert list(run[measure]) == ["mean", "p50", "p90", "p99", "max"]
    assert len(data["series"]) == 79


def test_the_same_arguments_give_the_same_runs_with_any_number_of_processes(tmp_path: Path) -> None:
    of = ("--experiment", "tetriinfer", "--point", "dispatch", "--seeds", "2")
    for workers in ("1", "2"):
        main(["sim", *of, "--workers", workers, "--json", str(tmp_path / workers)])
    assert _read(tmp_path / "1")["runs"] == _read(tmp_path / "2")["runs"]


def test_a_trace_is_simulated_as_it_came(folder: Path) -> None:
    data = _read(folder / "trace.json")
    assert data["experiment"] == "trace" and "trace.csv, 45 requests" in data["environment"]["trace"]
    assert {"coupled", "tetriinfer-2p", "tetriinfer-2p-queue-flip", "fluid"} <= {run["policy"] for run in data["runs"]}
    assert all(run["completed"] == run["requests"] == 45 and run["gpus"] == 8 for run in data["runs"])
    assert all(run["rate"] == pytest.approx(45 / 88, rel=1e-3) for run in data["runs"])


def test_azures_lines_are_read_and_wrong_ones_named() -> None:
    requests = azure_requests(TRACE)
    assert [(one.arrival_s, one.prompt_tokens, one.answer_tokens) for one in requests[:2]] == [
        (0.0, 300, 5),
        (pytest.approx(2.0), 337, 18),
    ]
    for text, message in (
        ("a,b\n", "the first line is not TIMESTAMP"),
        (TRACE.splitlines()[0] + "\n", "no request"),
        (TRACE + "yesterday,1,2\n", "line 47: 'yesterday,1,2' is not a time"),
        (TRACE + "2020-01-01 00:00:00.0000000,1,2\n", "line 47: no tokens, or earlier"),
    ):
        with pytest.raises(WrongTrace, match=message):
            azure_requests(text)


def test_the_page_stands_beside_the_paper(folder: Path) -> None:
    out = folder / "report.html"
    main(["report", str(folder / "burst.json"), str(folder / "trace.json"), "-o", str(out)])
    page = out.read_text(encoding="utf-8")
    assert '<span class="badge">simulated</span>' in page and not re.search(r"https?:|<link|@import|url\(|src=", page)
    balance = Balance()
    balance.feed(page)
    assert balance.wrong == [] and balance.open == []
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
    for title in (
        "Ours beside the paper&#x27;s: bursts",
        "Orders of prefill",
        "A trace of production",
        "fluid against",
    ):
        assert title in page, title
    assert "Steady loads" not in page  # nothing was run for it


def test_pages_are_of_one_experiment(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "ddit.json"
    other.write_text(
        '{"experiment":"ddit","environment":{"rib":1},"runs":[1],"curves":[],"bounds":[],"timelines":[],"levels":[]}',
        encoding="utf-8",
    )
    with pytest.raises(SystemExit, match="different experiments"):
        main(["report", str(folder / "burst.json"), str(other), "-o", str(tmp_path / "page.html")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nonsense"], "no cluster is called 'nonsense'; there are: coupled-16"),
        (["--point", "sweep"], "--point sweep: there are interference"),
        (["--gpus", "4"], "--gpus 4: give 8 or more"),
        (["--trace", "/nowhere/trace.csv"], "there is no such file"),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments: list[str], message: str) -> None:
    what = [] if "--trace" in arguments else ["--experiment", "tetriinfer"]
    with pytest.raises(SystemExit) as stopped:
        main(["sim", *what, *arguments])
    text = str(stopped.value)
    assert message in text and "\n" not in text
