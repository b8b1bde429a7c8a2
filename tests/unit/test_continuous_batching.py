"""The batching policy: chunks of fixed size, decoding first, order of arrival, preemption, and progress to the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.continuous_batching import (
    ContinuousBatching,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    SequenceLeft,
    StepDue,
    StepFinished,
)


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
