"""``loadgen bench flip`` without its stacks: requests that turn, flips read off metrics, one line for mistakes."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from common.messages.cluster import LanguageRole, RoleFlipped
from gateway.chat.metrics import LanguageMetrics
from loadgen.__main__ import main
from loadgen.bench.flip import Flips, flips_in, splits
from loadgen.bench.flip_workload import Kind, turning

PROMPTS, ANSWERS = Kind(400, 8), Kind(20, 100)


def test_one_kind_comes_after_the_other_at_its_rate() -> None:
    requests = turning((PROMPTS, ANSWERS), (5.0, 20.0), 100.0, 3, 256)
    first = [one for one in requests if one.due_s < 100]
    second = requests[len(first) :]
    assert requests == sorted(requests, key=lambda one: one.due_s) and requests[-1].due_s < 200
    assert 400 < len(first) < 600 and 1800 < len(second) < 2200
    for kind, found in ((PROMPTS, first), (ANSWERS, second)):
        assert all(len(one.tokens) + one.answer_tokens <= kind.most_tokens for one in found)
        mean = sum(len(one.tokens) for one in found) / len(found)
        assert 0.9 * kind.prompt_tokens < mean < 1.1 * kind.prompt_tokens
    long = [one.tokens for one in requests if len(one.tokens) > 15]
    assert len(set(long)) == len(long)
    assert turning((PROMPTS, ANSWERS), (5.0, 20.0), 100.0, 3, 256) == requests
    assert turning((PROMPTS, ANSWERS), (5.0, 20.0), 100.0, 4, 256) != requests


def test_flips_are_read_off_the_gateways_metrics() -> None:
    registry = CollectorRegistry()
    metrics = LanguageMetrics(registry)
    assert flips_in(generate_latest(registry).decode()) == Flips(0, 0.0, 0)
    for role, flip_s in ((LanguageRole.PREFILL, 0.002), (LanguageRole.DECODE, 0.004), (LanguageRole.DECODE, 0.03)):
        metrics.role_flipped(RoleFlipped(instance="x", roles=(role,), flip_s=flip_s))
    found = flips_in(generate_latest(registry).decode())
    assert (found.count, found.under_10_ms, round(found.seconds, 6)) == (3, 2, 0.036)
    later = found - Flips(1, 0.002, 1)
    assert later.text == "2 flips of 17.0 ms, 1 below 10 ms" and Flips(0, 0.0, 0).text == "no flips"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--load", "0"], ["--answers", "0", "5"]])
def test_what_makes_no_sense_is_refused_in_one_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "flip", *arguments])
    assert str(refusal.value).startswith("loadgen bench flip: rounds, tokens and room are 1 or more")


def test_every_split_leaves_either_role_somebody() -> None:
    assert splits(2) == {"1P1D": (1, 1)}
    assert splits(4) == {"3P1D": (3, 1), "2P2D": (2, 2), "1P3D": (1, 3)}


@pytest.mark.parametrize(
    "arguments", [["--instances", "1"], ["--splits", "3P1D"], ["--splits", "2P2D", "--instances", "3"]]
)
def test_splits_that_cannot_be_are_refused_in_one_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "flip", *arguments])
    assert str(refusal.value).startswith(f"loadgen bench flip: {arguments[0]} {arguments[1]}: ")
