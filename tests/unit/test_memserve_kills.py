"""``loadgen bench memserve-kills`` without its stacks: what counts as right, and as recovered."""

from pathlib import Path

import pytest

from loadgen.__main__ import main
from loadgen.bench.greedy_answers import Expected, GreedyAnswers
from loadgen.bench.language_stack import Replay
from loadgen.bench.memserve_kills import Outcome, Part
from loadgen.random_language_model import save_random_language_model


def test_an_answer_is_compared_up_to_the_first_near_tie() -> None:
    whole = Expected("abc", whole=True)
    assert whole.agrees("abc") and not whole.agrees("abcd") and not whole.agrees("ab")
    begun = Expected("ab\N{REPLACEMENT CHARACTER}", whole=False)
    assert begun.agrees("ab\N{LATIN SMALL LETTER E WITH ACUTE}x") and not begun.agrees("ax")


def test_prompts_answered_together_are_answered_as_alone(tmp_path: Path) -> None:
    greedy = GreedyAnswers(save_random_language_model(tmp_path / "random", 32, 1, deviation=0.3))
    asked = [([1, 2, 3], 4), ([7] * 20, 9), ([9, 8], 1), ([5] * 40, 6)]
    together = greedy.answers(asked)
    assert together == [greedy.answers([one])[0] for one in asked]
    assert len({answer.text for answer in together}) == len(asked)


def outcome(before: tuple[int, int], after: tuple[int, int]) -> Outcome:
    """From achieved and best tokens."""
    parts = {name: Part() for name in ("before", "during", "after")}
    for name, (cached, best) in (("before", before), ("after", after)):
        parts[name].replays.append(Replay([0.1], 100, cached, best))
    return Outcome(parts, ["decode-0"], 0.1, {"decode-0": 3}, [], 0)


def test_the_metric_has_recovered_within_a_margin() -> None:
    assert outcome((50, 50), (48, 50)).recovered
    assert not outcome((50, 50), (46, 50)).recovered
    assert outcome((60, 50), (50, 50)).recovered, "more than the best is no claim to have it again"
    assert outcome((20, 50), (18, 50)).recovered


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--kills", "0"], "--kills 0: give 1 or more"),
        (["--kv-mb", "0"], "--kv-mb 0: give 1 or more"),
        (["--rate", "0"], "--rate 0: give more than 0"),
        (["--topology", "star"], "--topology star: use one of fused, split, mixed"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "memserve-kills", str(tmp_path / "none.jsonl"), *arguments])
    assert str(refused.value) == f"loadgen bench memserve-kills: {complaint}"
