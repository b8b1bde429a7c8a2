"""``loadgen bench memserve-live`` in small: stack and requests, all of them real, by a trace that is made here."""

import json
from pathlib import Path

import pytest

from loadgen.__main__ import main


def test_a_rule_is_replayed_on_a_live_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Ten conversations of two turns each.
    rows = [(0, 1000 * number, [0, *range(3 * number + 1, 3 * number + 4)]) for number in range(10)]
    rows += [(1, at + 60_000, [*blocks, 1000 + at]) for _, at, blocks in rows]
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text(
        "".join(
            json.dumps({"timestamp": at, "input_length": 512 * len(blocks), "output_length": 64, "hash_ids": blocks})
            + "\n"
            for _, at, blocks in rows
        )
    )
    size = ["--rounds", "1", "--requests", "20", "--rate", "10", "--instances", "2", "--hidden", "32", "--layers", "1"]
    arguments = [str(trace), *size, "--rule", "cost", "--prefill-rate", "1000", "--json", str(out)]
    assert main(["bench", "memserve-live", *arguments]) == 0
    assert "cost        TTFT mean" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["policy"], run["completed"], run["gpus"]) == ("cost", 20, 2)
    assert run["ttft_s"]["mean"] > 0 and 0 < run["best_hit_ratio"] < 1 and run["cache_hit_ratio"] > 0
