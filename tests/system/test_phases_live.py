"""``loadgen bench phases`` in small: two stacks, a class and its requests, all of them real."""

import json
from pathlib import Path

import pytest

from loadgen.__main__ import main


def test_a_class_is_served_coupled_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    size = ["--rounds", "1", "--requests", "6", "--scale", "0.1", "--hidden", "32", "--layers", "1"]
    chosen = ["--classes", "LPHD", "--systems", "coupled-fixed", "split-predicting"]
    assert main(["bench", "phases", *size, *chosen, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "LPHD: 6 requests at once" in text and "over coupled-fixed" in text
    found = json.loads(out.read_text())
    assert [run["policy"] for run in found["runs"]] == ["coupled-fixed", "split-predicting"]
    for run in found["runs"]:
        assert (run["class"], run["completed"], run["gpus"]) == ("LPHD", 6, 2)
        assert 0 < run["ttft_s"]["mean"] < run["jct_s"]["mean"]
    assert set(found["runs"][1]["uses"]) == {"prefill-0", "decode-0"}
    (comparison,) = found["comparisons"]
    assert comparison["ratios"]["JCT mean"]["median"] > 0
