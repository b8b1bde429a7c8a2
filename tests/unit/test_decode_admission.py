"""Who comes into a batch and who leaves it (TetriInfer, section 3.4), on hand-written batches. Blocks of one token."""

from dataclasses import dataclass

import pytest

from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission, VictimRule


@dataclass
class Sequence:
    """``expected_tokens`` 0: nothing is predicted."""

    name: str
    order: int
    tokens: int
    expected_tokens: int = 0


SHORT = Sequence("short", 0, 50, 60)  # ends in 10 tokens
LONG = Sequence("long", 1, 40, 140)  # ends in 100
BATCH = [SHORT, LONG]


def _comes_in(rule: AdmissionRule, candidate: Sequence, free: int, batch: list[Sequence] = BATCH) -> bool:
    return DecodeAdmission(rule).refusal(candidate, batch, free, 1) is None


@pytest.mark.parametrize(("free", "expected"), [(29, False), (30, True)])
def test_greedy_looks_at_what_is_needed_now(free: int, expected: bool) -> None:
    assert _comes_in(AdmissionRule.GREEDY, Sequence("new", 2, 30, 500), free) is expected


@pytest.mark.parametrize(("free", "expected"), [(89, False), (90, True)])
def test_reserve_static_looks_at_all_it_will_need(free: int, expected: bool) -> None:
    """Literally as the paper has it: growth that the running ones are owed is not counted."""
    assert _comes_in(AdmissionRule.RESERVE_STATIC, Sequence("new", 2, 30, 90), free) is expected


@pytest.mark.parametrize(("free", "expected"), [(29, False), (30, True)])
def test_reserve_dynamic_looks_at_when_the_shortest_ends(free: int, expected: bool) -> None:
    """In 10 tokens the short one's 50 are free and the other two have grown by 10: 40 + 10 + 30 + 10 of 90 + 30."""
    assert _comes_in(AdmissionRule.RESERVE_DYNAMIC, Sequence("new", 2, 30, 90), free) is expected


def test_reserve_dynamic_refuses_what_will_not_fit_by_then() -> None:
    first = Sequence("first", 0, 10, 60)  # ends in 50 tokens, and then gives 10 back
    others = [first, LONG]
    # By then: 40 + 50 of the long one, 30 + 50 of the new one.
    reason = DecodeAdmission(AdmissionRule.RESERVE_DYNAMIC).refusal(Sequence("new", 2, 30, 90), others, 119, 1)
    assert reason == "170 blocks in 50 tokens, when the first ends, of 169"
    assert _comes_in(AdmissionRule.RESERVE_DYNAMIC, Sequence("new", 2, 30, 90), 120, others)
    assert _comes_in(AdmissionRule.GREEDY, Sequence("new", 2, 30, 90), 119, others)


def test_an_empty_instance_takes_what_fits_now() -> None:
    for rule in AdmissionRule:
        assert _comes_in(rule, Sequence("new", 0, 30, 9000), 40, [])


def test_one_that_outlived_its_prediction_is_expected_to_go_on_a_little() -> None:
    assert DecodeAdmission(past_tokens=20).remaining(Sequence("old", 0, 150, 140)) == 20
    assert DecodeAdmission(past_tokens=20).remaining(Sequence("young", 0, 100, 140)) == 40


def test_blocks_are_counted_whole() -> None:
    admission = DecodeAdmission(AdmissionRule.GREEDY)
    assert admission.refusal(Sequence("new", 0, 17), [], 2, 16) is None
    assert admission.refusal(Sequence("new", 0, 33), [], 2, 16) == "3 blocks for its tokens, 2 are free"


def test_the_victim_came_last_or_has_most_to_come() -> None:
    late = Sequence("late", 2, 10, 20)
    assert DecodeAdmission().victim([*BATCH, late]) == ("late", "it came last")
    name, why = DecodeAdmission(victim_rule=VictimRule.LONGEST_REMAINING).victim([*BATCH, late])
    assert name == "long" and why == "it has most yet to come, 100 tokens"
