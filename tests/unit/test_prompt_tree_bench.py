"""The prompt tree's benchmark, where no peer is installed."""

import json
from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.prompt_tree import build_tree, check, make_workload, pack


def test_the_workload_tells_right_answers_from_wrong_ones() -> None:
    work = make_workload(prompts=12, groups=3)
    tree = build_tree(work)

    def ours(number: int, hit: bool) -> dict[int, int]:
        found = tree.match(pack(work.prompts[number] if hit else work.fresh[number]))
        return {int(name): blocks for name, blocks in found.items()}

    assert check(ours, work, exact=True) == 0
    assert check(lambda number, hit: {}, work, exact=True) == 24
    assert check(lambda number, hit: {0: 256 if hit else 128}, work, exact=False) == 0


def test_it_runs_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "prompt-tree", "--prompts", "12", "--groups", "3", "--pairs", "2", "--blocks", "3000"]
    assert main([*command, "--instances", "10", "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["large"]["blocks"] >= 3000
    assert result["large"]["match_us"] > 0
    assert len(result["skipped"]) + len(result["comparisons"]) > 0
    assert "bytes a block" in capsys.readouterr().out
