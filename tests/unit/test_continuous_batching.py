"""The batching policy: chunks of fixed size, decoding first, order of arrival, preemption, and progress to the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.batching_events import (
    CachedPrefix,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    SequenceLeft,
    StepDue,
    StepFinished,
)
from common.policies.language.continuous_batching import ContinuousBatching
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission, VictimRule
from common.policies.language.prefill_schedule import PrefillOrder, PrefillSchedule


def _pieces(batching: ContinuousBatching, free: int) -> tuple[Piece, ...]:
    (step,) = batching.handle(StepDue(free), 0.0)
    assert isinstance(step, RunStep)
    return step.pieces


def test_prompts_are_sliced_and_merged_to_chunks() -> None:
    batching = ContinuousBatching(blocks=100, chunk_tokens=32)
    for name, tokens in (("a", 40), ("b", 10), ("c", 30)):
        batching.handle(SequenceArrived(name, tokens, tokens + 5), 0.0)
    assert _pieces(batching, 100) == (Piece("a", 0, 32, 3, False),)
    batching.handle(StepFinished(), 0.0)
    assert _pieces(batching, 97) == (
        Piece("a", 32, 8, 0, True),
        Piece("b", 0, 10, 1, True),
        Piece("c", 0, 14, 2, False),
    )
    batching.handle(StepFinished(), 0.0)
    assert _pieces(batching, 94) == (
        Piece("a", 40, 1, 0, True),
        Piece("b", 10, 1, 0, True),
        Piece("c", 14, 16, 0, True),
    )


def test_who_came_last_is_preempted_and_comes_back_before_later_ones() -> None:
    batching = ContinuousBatching(blocks=4, chunk_tokens=64)
    for name in "ab":
        batching.handle(SequenceArrived(name, 32, 60), 0.0)
    batching.handle(SequenceArrived("c", 5, 60), 0.0)
    assert [piece.sequence for piece in _pieces(batching, 4)] == ["a", "b"]
    batching.handle(StepFinished(), 0.0)
    (preempt,) = batching.handle(StepDue(0), 0.0)
    assert isinstance(preempt, PreemptSequence) and preempt.sequence == "b"
    assert _pieces(batching, 2) == (Piece("a", 32, 1, 1, True),)
    batching.handle(StepFinished(frozenset("a")), 0.0)
    assert _pieces(batching, 4)[0] == Piece("b", 0, 33, 3, True)


def test_a_victim_whose_blocks_are_shared_frees_less_than_it_holds() -> None:
    """Forks of one prompt: until one frees a block, the next goes too; a is not given what is not there."""
    batching = ContinuousBatching(blocks=8, chunk_tokens=64)
    for name in "abc":
        batching.handle(SequenceArrived(name, 33, 60, 32, 2), 0.0)
    # Each one's next token needs a block. One is free, and neither c nor b has any for itself alone.
    (first,) = batching.handle(StepDue(1), 0.0)
    assert isinstance(first, PreemptSequence) and first.sequence == "c"
    (second,) = batching.handle(StepDue(1), 0.0)
    assert isinstance(second, PreemptSequence) and second.sequence == "b"
    assert _pieces(batching, 1) == (Piece("a", 32, 1, 1, True),)
    batching.handle(StepFinished(), 0.0)
    # Not even its own blocks are free after it has gone: nothing can be done until somebody lets them go.
    for _ in range(15):
        _pieces(batching, 0)
        batching.handle(StepFinished(), 0.0)
    (itself,) = batching.handle(StepDue(0), 0.0)
    assert isinstance(itself, PreemptSequence) and itself.sequence == "a"
    assert batching.handle(StepDue(0), 0.0) == []
    assert _pieces(batching, 8)[0] == Piece("a", 0, 49, 4, True)


def test_what_is_shared_is_not_computed_and_takes_no_block_that_somebody_holds() -> None:
    batching = ContinuousBatching(blocks=8, chunk_tokens=64)
    for name in "abc":
        batching.handle(SequenceArrived(name, 40, 60), 0.0)
    # Of five blocks to be had, a takes three. Two of b's are a's, so it takes one; nobody holds the two of c's.
    cached = {"b": CachedPrefix(32, 2), "c": CachedPrefix(32, 0)}
    (step,) = batching.handle(StepDue(5, cached), 0.0)
    assert isinstance(step, RunStep)
    assert step.pieces == (Piece("a", 0, 40, 3, True), Piece("b", 32, 8, 1, True))
    batching.handle(StepFinished(), 0.0)
    (step,) = batching.handle(StepDue(3, {"c": CachedPrefix(32, 0)}), 0.0)
    assert isinstance(step, RunStep) and step.pieces[-1] == Piece("c", 32, 8, 1, True)
    assert batching.prompt_tokens == 0


def test_who_waits_for_what_another_computes_is_not_overtaken() -> None:
    batching = ContinuousBatching(blocks=20, chunk_tokens=64)
    for name in "abc":
        batching.handle(SequenceArrived(name, 40, 60), 0.0)
    (step,) = batching.handle(StepDue(20, {"b": CachedPrefix(awaited=True)}), 0.0)
    assert isinstance(step, RunStep) and [piece.sequence for piece in step.pieces] == ["a"]
    batching.handle(StepFinished(), 0.0)
    (step,) = batching.handle(StepDue(17, {"b": CachedPrefix(32, 2)}), 0.0)
    assert isinstance(step, RunStep) and [piece.sequence for piece in step.pieces] == ["a", "b", "c"]


def test_what_can_never_fit_is_refused() -> None:
    batching = ContinuousBatching(blocks=4)
    (refusal,) = batching.handle(SequenceArrived("a", 10, 65), 0.0)
    assert isinstance(refusal, RefuseSequence) and "5 blocks" in refusal.reason
    assert batching.handle(SequenceArrived("b", 10, 64), 0.0) == []


def test_a_cancelled_sequence_is_forgotten_also_while_it_is_computed() -> None:
    batching = ContinuousBatching(blocks=4)
    for name in "ab":
        batching.handle(SequenceArrived(name, 10, 20), 0.0)
    _pieces(batching, 4)
    batching.handle(SequenceLeft("a"), 0.0)
    batching.handle(StepFinished(), 0.0)
    assert _pieces(batching, 3) == (Piece("b", 10, 1, 0, True),)
    batching.handle(StepFinished(), 0.0)
    batching.handle(SequenceLeft("b"), 0.0)
    assert batching.handle(StepDue(4), 0.0) == []


def test_no_more_sequences_than_allowed() -> None:
    batching = ContinuousBatching(blocks=40, most_sequences=2)
    for name in "abc":
        batching.handle(SequenceArrived(name, 5, 10), 0.0)
    assert len(_pieces(batching, 40)) == 2
    assert (batching.running, batching.waiting) == (2, 1)
    with pytest.raises(RuntimeError, match="under way"):
        batching.handle(StepDue(40), 0.0)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=8),
    blocks=st.integers(6, 30),
    chunk=st.integers(1, 70),
    most=st.integers(1, 8),
)
def test_everything_is_computed_once_in_order_and_comes_to_its_end(
    sequences: list[tuple[int, int]], blocks: int, chunk: int, most: int
) -> None:
    batching = ContinuousBatching(blocks, 16, chunk, most)
    tokens = {str(number): prompt for number, (prompt, _) in enumerate(sequences)}
    end = {str(number): prompt + answer for number, (prompt, answer) in enumerate(sequences)}
    computed = dict.fromkeys(tokens, 0)
    held = dict.fromkeys(tokens, 0)
    for name in tokens:
        assert batching.handle(SequenceArrived(name, tokens[name], end[name]), 0.0) == []
    for _ in range(5000):
        if not held:
            return
        step = None
        while step is None:
            (decision,) = batching.handle(StepDue(blocks - sum(held.values())), 0.0)
            if isinstance(decision, PreemptSequence):
                computed[decision.sequence] = held[decision.sequence] = 0
            else:
                assert isinstance(decision, RunStep) and decision.reason
                step = decision
        ended = set()
        for piece in step.pieces:
            name = piece.sequence
            held[name] += piece.new_blocks
            assert piece.start == computed[name] and piece.count >= 1
            computed[name] += piece.count
            assert computed[name] <= 16 * held[name]
            assert piece.last == (computed[name] == tokens[name])
            tokens[name] += piece.last
            if tokens[name] > end[name]:
                ended.add(name)
        assert sum(held.values()) <= blocks and sum(map(bool, held.values())) <= most
        assert sum(piece.count for piece in step.pieces if piece.count > 1) <= chunk
        for name in ended:
            del held[name], computed[name], tokens[name]
        batching.handle(StepFinished(frozenset(ended)), 0.0)
    raise AssertionError("not at the end after 5000 steps")


def _step(batching: ContinuousBatching, free: int, *ended: str) -> list[tuple[str, int]]:
    """One step's pieces by name and number of tokens; those of ``ended`` end with it."""
    pieces = _pieces(batching, free)
    batching.handle(StepFinished(frozenset(ended)), 0.0)
    return [(piece.sequence, piece.count) for piece in pieces]


def test_the_schedule_gives_the_order_of_prompts_and_a_short_one_goes_between_two_chunks() -> None:
    batching = ContinuousBatching(1000, chunk_tokens=100, schedule=PrefillSchedule(PrefillOrder.SRF))
    batching.handle(SequenceArrived("long", 250, 300), 0.0)
    assert _step(batching, 1000) == [("long", 100)]
    batching.handle(SequenceArrived("short", 30, 40), 0.0)
    assert batching.prompt_tokens == 180
    assert _step(batching, 900) == [("short", 30), ("long", 70)]
    assert _step(batching, 900) == [("short", 1), ("long", 80)]
    assert batching.prompt_tokens == 0


def test_one_prompt_alone_is_not_sliced_where_that_is_wanted() -> None:
    batching = ContinuousBatching(1000, chunk_tokens=100, alone_tokens=400)
    batching.handle(SequenceArrived("a", 250, 300), 0.0)
    assert _step(batching, 1000, "a") == [("a", 250)]
    for name in "bc":
        batching.handle(SequenceArrived(name, 250, 300), 0.0)
    assert _step(batching, 1000) == [("b", 100)]


def test_who_is_refused_lets_those_go_on_that_hold_blocks() -> None:
    """The short one comes first but has no room; the long one, half computed, is not held up by that."""
    batching = ContinuousBatching(20, chunk_tokens=100, schedule=PrefillSchedule(PrefillOrder.SRF))
    batching.handle(SequenceArrived("long", 250, 251), 0.0)
    assert _step(batching, 20) == [("long", 100)]
    batching.handle(SequenceArrived("short", 70, 80), 0.0)
    assert _step(batching, 4) == [("long", 100)]
    assert _step(batching, 4, "long") == [("long", 50)]
    assert _step(batching, 20) == [("short", 70)]


def test_admission_goes_by_what_sequences_are_predicted_to_come_to() -> None:
    admission = DecodeAdmission(AdmissionRule.RESERVE_STATIC, VictimRule.LONGEST_REMAINING)
    batching = ContinuousBatching(20, admission=admission)
    batching.handle(SequenceArrived("a", 33, 300, computed=32, expected_tokens=160), 0.0)
    batching.handle(SequenceArrived("b", 33, 300, computed=32, expected_tokens=320), 0.0)
    assert _step(batching, 20) == [("a", 1)]  # b would come to 20 blocks, 17 are free
    assert _step(batching, 17) == [("a", 1)]
    batching.handle(SequenceArrived("c", 16, 20, expected_tokens=17), 0.0)
    batching.handle(SequenceLeft("b"), 0.0)
    assert _step(batching, 17) == [("a", 1), ("c", 16)]
    # Both need a block at some time; of them a has more to come.
    (preempt,) = batching.handle(StepDue(0), 0.0)
    assert isinstance(preempt, PreemptSequence) and preempt.sequence == "a" and "124 tokens" in preempt.reason
