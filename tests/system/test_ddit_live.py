"""``loadgen bench ddit-live`` in small: stack, requests and simulator, all of them real, by a profile that is given."""

import json
from pathlib import Path

import pytest

from common.policies.video.rib import KindProfile, Rib, VideoKind
from loadgen.__main__ import main
from tests.support.small_model import save_small_model


def test_policies_run_on_the_live_stack_and_in_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rib, out = save_small_model(tmp_path / "model"), tmp_path / "rib.json", tmp_path / "out.json"
    rib.write_text(Rib({VideoKind(32, 32, 13): KindProfile({1: 0.02, 2: 0.01}, 0.2)}).to_json())
    size = ["--rounds", "1", "--requests", "3", "--steps", "2", "--load", "0.3", "--policy", "sdop:1"]
    where = ["--video-model", str(model), "--rib", str(rib), "--json", str(out)]
    assert main(["bench", "ddit-live", *size, *where, "--parity"]) == 0
    said = capsys.readouterr().out
    assert "1 rounds of 3 videos of 2 steps" in said and "sdop:1 mean: simulated" in said
    result = json.loads(out.read_text())
    (run,) = result["runs"]
    assert (run["policy"], run["requests"], run["completed"], run["gpus"]) == ("sdop:1", 3, 3, 2)
    assert list(run["latency_s"]) == ["mean", "p50", "p90", "p99", "max"] and run["latency_s"]["mean"] > 0
    assert [(parity["policy"], parity["measure"]) for parity in result["parity"]] == [
        ("sdop:1", "mean"), ("sdop:1", "p99"),
    ]  # fmt: skip
    # One round more, by the setting of the first.
    assert main(["bench", "ddit-live", "--continue", str(out), "--rounds", "1", "--json", str(out)]) == 0
    assert "2 rounds, 1 of them from before" in capsys.readouterr().out
    assert [run["seed"] for run in json.loads(out.read_text())["runs"]] == [0, 1]
