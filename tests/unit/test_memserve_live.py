"""``loadgen bench memserve-live`` without its stacks: traces made small, answers read, one clear line for mistakes."""

import json
from pathlib import Path

import pytest

from common.mempool.address import BLOCK_TOKENS
from loadgen.__main__ import main
from loadgen.bench.language_stack import Answer, Replay, counted
from loadgen.bench.memserve_live import hits
from loadgen.bench.process import BenchmarkError
from loadgen.bench.trace_excerpt import SmallRequest, excerpt
from loadgen.simulator.memserve.trace import read_mooncake
from loadgen.simulator.memserve.turns import Turn

VOCABULARY = 100
# Of two conversations and a single request; milliseconds, tokens of prompt and answer, blocks.
ROWS = (
    (0, 1100, 5, [0, 1, 2]),
    (1000, 1024, 64, [0, 3]),
    (4000, 1600, 65, [0, 1, 4, 5]),
    (5000, 1536, 1, [0, 3, 6]),
    (8000, 300, 1, [7]),
)


@pytest.fixture
def turns(tmp_path: Path) -> list[Turn]:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS))
    return read_mooncake(trace)


def common(one: SmallRequest, other: SmallRequest) -> int:
    """How many blocks two prompts have in common from the first on."""
    pairs = zip(one.tokens, other.tokens, strict=False)
    return next((place for place, (mine, yours) in enumerate(pairs) if mine != yours), 0) // BLOCK_TOKENS


def test_blocks_times_and_answers_become_smaller_and_beginnings_stay(turns: list[Turn]) -> None:
    small = excerpt(turns, 5, 2.0, 0, VOCABULARY)
    assert [request.due_s for request in small] == [0.0, 0.3125, 1.25, 1.5625, 2.5]
    assert [len(request.tokens) for request in small] == [2 * 16 + 2, 2 * 16 + 1, 3 * 16 + 2, 3 * 16 + 1, 9]
    assert [request.answer_tokens for request in small] == [1, 2, 3, 1, 1]
    assert all(0 <= token < VOCABULARY for request in small for token in request.tokens)
    assert [common(small[0], other) for other in small[1:]] == [1, 2, 1, 0]
    assert common(small[1], small[3]) == 2
    names = [request.conversation for request in small]
    assert names[0] == names[2] != names[1] == names[3] != names[4]
    assert excerpt(turns, 5, 2.0, 0, VOCABULARY) == small


def test_whole_conversations_are_drawn_others_by_another_seed(turns: list[Turn]) -> None:
    drawn = set()
    for seed in range(20):
        small = excerpt(turns, 2, 1.0, seed, VOCABULARY)
        assert small[0].due_s == 0.0
        drawn.add(tuple(request.conversation for request in small))
    two = {("conversation-0",) * 2, ("conversation-1",) * 2}
    assert two < drawn and all(len(names) >= 2 for names in drawn)


def said(**told: object) -> bytes:
    return b"data: " + json.dumps(told).encode() + b"\n"


def test_an_answer_is_read_line_by_line() -> None:
    answer = Answer(10.0)
    answer.take(b"\n", 10.1)
    answer.take(b": still there\n", 10.1)
    for now_s in (10.5, 10.75):
        answer.take(said(choices=[{"index": 0, "text": ""}], usage=None), now_s)
    with pytest.raises(BenchmarkError, match="before its end"):
        _ = answer.ttft_s
    usage = {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
    answer.take(said(choices=[], usage=usage), 11.0)
    answer.take(b"data: [DONE]\n", 11.0)
    assert (answer.ttft_s, answer.prompt_tokens, answer.cached_tokens) == (0.5, 40, 32)
    with pytest.raises(BenchmarkError, match="failed: too long"):
        answer.take(said(error={"message": "too long"}), 12.0)


def test_counters_and_hits() -> None:
    assert counted("# HELP a_total b\na_total 12.0\nab_total 3\n", "a_total") == 12
    with pytest.raises(BenchmarkError, match="no c_total"):
        counted("a_total 12.0\n", "c_total")
    assert hits([Replay([0.1], 100, 30, 40), Replay([0.1], 100, 45, 60)]) == {
        "cache_hit_ratio": 0.375,
        "best_hit_ratio": 0.5,
        "of_best": 0.75,
    }
    assert hits([Replay([0.1], 100, 0, 0)])["of_best"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "--rule", "fair"], "there is no routing rule 'fair'"),
        (["none.jsonl", "--rounds", "0"], "--rounds 0: give 1 or more"),
        (["none.jsonl", "--prefill-rate", "0"], "--prefill-rate 0: give more than 0"),
        (["none.jsonl"], "none.jsonl: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "memserve-live", *arguments])
    assert str(refusal.value).startswith(f"loadgen bench memserve-live: {message}")
