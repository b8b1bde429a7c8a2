"""Kill -9 during a replayed trace, on a whole stack: right answers, trees that agree, and the hit that there was.

``TRIPTYCH_TEST_KILLS`` says how many die on each topology; where they are many, it is done on all of them, and victims
and moments are drawn anew each time: ``TRIPTYCH_TEST_SEED`` repeats a draw.
"""

import json
import os
from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.memserve_kills import TOPOLOGIES

KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "2"))
SEED = os.environ["TRIPTYCH_TEST_SEED"] if len(TOPOLOGIES) < KILLS else "0"
CONVERSATIONS = 40


def write_trace(file: Path) -> Path:
    """Conversations of two turns each, all with the same first block of 512 tokens."""
    rows = [(1000 * number, [0, *range(3 * number + 1, 3 * number + 4)]) for number in range(CONVERSATIONS)]
    rows += [(at + 20_000, [*blocks, 1000 + at]) for at, blocks in rows]
    asked = (
        {"timestamp": at, "input_length": 512 * len(blocks), "output_length": 1024, "hash_ids": blocks}
        for at, blocks in sorted(rows)
    )
    file.write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    return file


@pytest.mark.parametrize("topology", TOPOLOGIES if len(TOPOLOGIES) < KILLS else ["mixed"])
def test_whoever_is_killed_answers_are_right_and_trees_agree(topology: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    trace = str(write_trace(tmp_path / "trace.jsonl"))
    # The longest prefix, whatever the load is: so that the hit does not hang on how busy this machine is.
    size = ["--requests", "10", "--rate", "20", "--hidden", "32", "--layers", "2", "--kv-mb", "8"]
    arguments = [trace, "--kills", str(KILLS), "--topology", topology, "--rule", "prompt_tree", "--seed", SEED]
    assert main(["bench", "memserve-kills", *arguments, *size, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["topologies"][topology]
    assert len(found["killed"]) == KILLS
    assert found["wrong"] == []
    assert sum(found["blocks"].values()) > 0
    assert found["parts"]["before"]["answers"] >= 10 and found["parts"]["after"]["answers"] >= 10
    if topology != "split":
        # There, what a decode instance has counts among the best, and the prefill instance may not have it.
        assert found["recovered"], found["parts"]
