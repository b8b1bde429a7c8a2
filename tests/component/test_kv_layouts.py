"""``loadgen bench kv-transfer --compare layouts`` in small: two processes, the real bus and UCX."""

import json
from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.kv_layouts import Way


def test_every_way_brings_all_to_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    # More pieces than fit one request.
    size = ["--prompt-tokens", "1040", "--hidden", "64", "--layers", "5", "--rounds", "1", "--loaded", "2"]
    assert main(["bench", "kv-transfer", "--compare", "layouts", *size, "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "MemServe's ordering" in told and all(f"  {way}" in told for way in Way)
    found = json.loads(out.read_text())["layouts"]
    assert found["messages"] == dict(zip(Way, [650, 650, 65, 5, 1], strict=True))
    for readings in found["readings"].values():
        assert {way: len(rounds) for way, rounds in readings.items()} == dict.fromkeys(Way, 1)
        assert [readings[way][0]["requests"] for way in Way] == [2, 5, 1, 5, 1]
