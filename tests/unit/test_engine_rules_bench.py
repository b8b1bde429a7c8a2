"""The benchmark of an engine's rules: every arm answers all that it is asked, and readings are compared by round."""

import json
from pathlib import Path

import pytest

from common.policies.language.batching_rules import BatchingRules
from loadgen.__main__ import main
from loadgen.bench.engine_rules import PARTS, Arm, Part, Reading, told


def test_every_order_gives_every_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rules.json"
    words = ["bench", "engine-rules", "--part", "order", "--requests", "3", "--rounds", "1", "--json", str(file)]
    assert main(words) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [run["policy"] for run in runs] == [arm.name for arm in PARTS["order"].arms]
    for run in runs:
        assert run["completed"] == 3 and 0 < run["ttft_s"]["mean"] <= run["jct_s"]["max"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Prompts: 3 requests at once, 1 rounds") and len(lines) == 1 + len(runs)


def test_ratios_are_those_of_rounds() -> None:
    part = Part("Both", (Arm("one", BatchingRules()), Arm("other", BatchingRules())), lambda _, __: [], "jct_s")
    readings = {
        "one": [Reading((1.0,), (2.0, 4.0), 0), Reading((1.0,), (8.0, 8.0), 2)],
        "other": [Reading((1.0,), (3.0, 3.0), 1), Reading((1.0,), (2.0, 6.0), 1)],
    }
    lines = told(part, readings, 2)
    assert "5.50 s  1.000" in lines[1] and "all done   6.00 s" in lines[1] and lines[1].endswith("1 preempted")
    assert "3.50 s  0.750 (0.625 to 0.875)" in lines[2] and "all done   4.50 s" in lines[2]
