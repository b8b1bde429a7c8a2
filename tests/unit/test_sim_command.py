"""``loadgen sim``: the JSON that is promised, the same with any number of processes, one clear line for mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadgen.__main__ import main
from loadgen.simulator.points import NAMES

SMALL = ("--gpus", "4", "--policy", "sdop:1", "ddit", "--mix", "even", "--seeds", "2", "--requests", "12", "--quick")


def _simulate(out: Path, *more: str) -> dict[str, Any]:
    assert main(["sim", "--experiment", "ddit", *SMALL, *more, "--json", str(out)]) == 0
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


def test_the_json_has_what_is_promised(tmp_path: Path) -> None:
    data = _simulate(tmp_path / "a.json")
    assert data["environment"]["simulated"] is True
    for run in data["runs"]:
        assert {"policy", "rate", "seed", "requests", "completed", "gpu_seconds", "load", "mix", "gpus"} <= set(run)
        assert list(run["latency_s"]) == ["mean", "p50", "p90", "p99", "max"]
        assert run["completed"] == run["requests"] and run["gpus"] == 4
    assert {run["point"] for run in data["runs"]} == set(NAMES)
    assert {(run["policy"], run["seed"]) for run in data["runs"]} == {
        (p, s) for p in ("sdop:1", "ddit") for s in (0, 1)
    }


def test_the_runs_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone = _simulate(tmp_path / "a.json")
    together = _simulate(tmp_path / "b.json", "--workers", "2")
    assert alone["runs"] == together["runs"]
    assert alone["curves"] == together["curves"]


def test_the_first_request_of_all_policies_is_the_same(tmp_path: Path) -> None:
    """Paired seeds: a point's shares of classes are those of its seed, not of its policy."""
    by_seed: dict[tuple[str, float, int], set[tuple[int, ...]]] = {}
    for run in _simulate(tmp_path / "a.json")["runs"]:
        by_seed.setdefault((run["point"], run["load"], run["seed"]), set()).add(tuple(run["class_requests"]))
    assert all(len(classes) == 1 for classes in by_seed.values())


def test_a_short_day(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--day", "--policy", "ddit", "--gpus", "8", "--requests", "200"]) == 0
    assert "200 videos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nonsense"], "no policy is called 'nonsense'; there are: "),
        (["--gpus", "12"], "--gpus 12: give 1 to 8, or a multiple of 8"),
        (["--mix", "odd"], "no mix is called 'odd'; there are: even"),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--requests", "1"], "--requests 1: give 2 or more"),
        (["--load", "0", "--day"], "--load 0.0: give a share of saturation above 0"),
        (["--rib", "/nowhere/rib.json"], "there is no such file"),
        (["--record", "/nowhere/record.jsonl"], "there is no such file"),
        (["--json", "/nowhere/out.json"], "the folder does not exist"),
        (["--step-240p", "-1"], "give seconds above 0"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sim", *arguments])
    text = str(stopped.value)
    assert message in text and "\n" not in text


def test_a_record_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joined = '{"at_s":0,"event":"WorkerJoined","instance":"dit-0","service":"dit","slot":0,"server":""}'
    arrived = (
        '{"at_s":1,"event":"JobArrived","job_id":"a","arrival_s":1,"width":256,"height":144,"frames":51,"steps":30}'
    )
    file = tmp_path / "record.jsonl"
    file.write_text(f"{joined}\n{arrived}\n", encoding="utf-8")
    assert main(["sim", "--record", str(file), "--policy", "fifo"]) == 0
    assert "fifo: 1 recorded requests on 1 slots; latency mean 3.14 s" in capsys.readouterr().out


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rib.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="kinds: not a list"):
        main(["sim", "--rib", str(file)])
