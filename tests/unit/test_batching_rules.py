"""Every combination of orders, admission, victims and batches: the books hold, and all comes to its end in any pool."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.batching_events import (
    LengthPredicted,
    PreemptSequence,
    RunStep,
    SequenceArrived,
    SequenceComing,
    SequenceLeft,
    StepDue,
    StepFinished,
)
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission, VictimRule
from common.policies.language.prefill_schedule import PrefillOrder

BLOCK = 4
_ENOUGH_STEPS = 4000

RULES = st.builds(
    BatchingRules,
    alone_tokens=st.sampled_from((0, 64)),
    order=st.sampled_from(PrefillOrder),
    batch=st.integers(1, 5),
    ageing=st.sampled_from((0.0, 5.0)),
    merges_batches=st.booleans(),
    admission=st.builds(DecodeAdmission, st.sampled_from(AdmissionRule), st.sampled_from(VictimRule)),
    fixed=st.booleans(),
)


@dataclass
class _Sequence:
    tokens: int
    end: int
    computed: int = 0
    blocks: int = 0


@dataclass
class _Instance:
    """An instance that believes its policy, and checks what it says."""

    rules: BatchingRules
    blocks: int
    chunk: int
    most: int
    sequences: dict[str, _Sequence] = field(default_factory=dict)
    coming: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batching = self.rules.batching(self.blocks, BLOCK, self.chunk, self.most)
        self.now_s = 0.0

    @property
    def free(self) -> int:
        return self.blocks - sum(one.blocks for one in self.sequences.values()) - sum(self.coming.values())

    @property
    def holding(self) -> set[str]:
        return {name for name, one in self.sequences.items() if one.blocks}

    def arrive(self, name: str, prompt: int, end: int, expected: int, blocks: int = 0) -> None:
        computed = prompt - 1 if blocks else 0
        event = SequenceArrived(name, prompt, end, computed, blocks, expected)
        assert self.batching.handle(event, self.now_s) == []
        self.sequences[name] = _Sequence(prompt, end, computed, blocks)

    def leave(self, name: str) -> None:
        assert self.batching.handle(SequenceLeft(name), self.now_s) == []
        self.sequences.pop(name, None)
        self.coming.pop(name, None)

    def step(self) -> bool:
        """One pass; False: nothing can be done."""
        self.now_s += 0.01
        run: RunStep | None = None
        while run is None:
            decisions = self.batching.handle(StepDue(self.free), self.now_s)
            if not decisions:
                return False
            (decision,) = decisions
            assert isinstance(decision, RunStep | PreemptSequence) and decision.reason
            if isinstance(decision, RunStep):
                run = decision
            else:
                victim = self.sequences[decision.sequence]
                assert victim.blocks
                victim.computed = victim.blocks = 0
        before = self.holding
        ended = set()
        for piece in run.pieces:
            one = self.sequences[piece.sequence]
            one.blocks += piece.new_blocks
            assert piece.start == one.computed and piece.count >= 1
            one.computed += piece.count
            assert one.computed <= BLOCK * one.blocks
            assert piece.last == (one.computed == one.tokens)
            one.tokens += piece.last
            if one.tokens > one.end:
                ended.add(piece.sequence)
        assert self.free >= 0
        assert len(self.holding) <= max(self.most, len(before))
        assert sum(piece.count for piece in run.pieces if piece.count > 1) <= max(self.chunk, self.rules.alone_tokens)
        for name in ended:
            del self.sequences[name]
        assert self.batching.handle(StepFinished(frozenset(ended)), self.now_s) == []
        return True


@settings(max_examples=250, deadline=None)
@given(
    rules=RULES,
    # Prompts, answers, how far off the prediction is, and how many passes there are before each comes.
    arrivals=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(-60, 60), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(18, 40),
    chunk=st.integers(1, 50),
    most=st.integers(1, 8),
    seed=st.integers(0, 999),
    leaving=st.sampled_from((0.0, 0.1)),
)
def test_everything_comes_to_its_end(
    rules: BatchingRules,
    arrivals: list[tuple[int, int, int, int]],
    blocks: int,
    chunk: int,
    most: int,
    seed: int,
    leaving: float,
) -> None:
    """The pool holds the longest sequence there can be, just so. Some are cancelled, in whatever state they are."""
    instance = _Instance(rules, blocks, chunk, most)
    chance = random.Random(seed)

    def step() -> bool:
        worked = instance.step()
        if instance.sequences and chance.random() < leaving:
            instance.leave(chance.choice(list(instance.sequences)))
        if instance.sequences and chance.random() < leaving:
            instance.batching.handle(LengthPredicted(chance.choice(list(instance.sequences)), 50), instance.now_s)
        return worked

    for number, (prompt, answer, off, passes) in enumerate(arrivals):
        for _ in range(passes):
            step()
        end = prompt + answer - 1
        instance.arrive(str(number), prompt, end, max(0, end + off))
    for _ in range(_ENOUGH_STEPS):
        if not instance.sequences:
            break
        assert step()
    assert not instance.sequences and instance.free == blocks
    assert (instance.batching.running, instance.batching.waiting, instance.batching.prompt_tokens) == (0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    rules=RULES,
    sequences=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 30), st.booleans()), min_size=1, max_size=12),
    blocks=st.integers(18, 40),
)
def test_what_is_handed_over_comes_to_its_end_too(
    rules: BatchingRules, sequences: list[tuple[int, int, bool]], blocks: int
) -> None:
    """Some bring blocks, which they are given once the rules let them in and hold before they are there."""
    instance = _Instance(rules, blocks, chunk=16, most=8)
    handed_over: dict[str, tuple[int, int]] = {}
    for number, (prompt, answer, brings) in enumerate(sequences):
        if brings:
            handed_over[str(number)] = (prompt, prompt + answer - 1)
        else:
            instance.arrive(str(number), prompt, prompt + answer - 1, expected=prompt + answer)
    for number in range(_ENOUGH_STEPS):
        if not handed_over and not instance.sequences:
            break
        for name in list(instance.coming):
            held = instance.coming[name]
            instance.leave(name)
            if number % 5:  # others never arrive, and try again
                instance.arrive(name, *handed_over.pop(name), expected=60, blocks=held)
        for name, (prompt, _) in handed_over.items():
            need = -(-prompt // BLOCK)
            if instance.batching.refusal(prompt, 60, instance.free) is None:
                assert need <= instance.free
                instance.coming[name] = need
                instance.batching.handle(SequenceComing(name, prompt, 60), instance.now_s)
        assert instance.step() or instance.coming or not instance.sequences
    assert not handed_over and not instance.sequences and instance.free == blocks


def _run(instance: _Instance) -> list[set[str]]:
    """Who held blocks, after each pass."""
    held = []
    while instance.sequences:
        assert instance.step()
        held.append(instance.holding)
    return held


def test_a_fixed_batch_computes_its_prompts_and_lets_nobody_in_before_all_are_at_their_end() -> None:
    instance = _Instance(BatchingRules(fixed=True), blocks=100, chunk=16, most=2)
    for name, prompt, end in (("a", 20, 22), ("b", 4, 30), ("c", 4, 6), ("d", 4, 8)):
        instance.arrive(name, prompt, end, expected=0)
    assert instance.step() and instance.holding == {"a"}
    # a has its first token with this pass, and its second when b's prompt is computed too.
    assert instance.step() and instance.holding == {"a", "b"}
    assert (instance.sequences["a"].tokens, instance.sequences["b"].tokens) == (21, 5)
    held = _run(instance)
    assert [set(batch) for number, batch in enumerate(held) if not number or batch != held[number - 1]] == [
        {"a", "b"},
        {"b"},
        set(),
        {"c", "d"},
        {"d"},
        set(),
    ]


def test_who_comes_while_the_prompts_of_a_fixed_batch_are_computed_is_of_that_batch() -> None:
    instance = _Instance(BatchingRules(fixed=True), blocks=100, chunk=16, most=3)
    instance.arrive("a", 20, 30, expected=0)
    assert instance.step()
    instance.arrive("b", 4, 30, expected=0)
    assert instance.step() and instance.holding == {"a", "b"}
    assert instance.step()  # the first that decodes
    instance.arrive("c", 4, 30, expected=0)
    assert instance.step() and instance.holding == {"a", "b"}


def test_who_is_thrown_out_of_a_fixed_batch_is_of_the_next() -> None:
    instance = _Instance(BatchingRules(fixed=True), blocks=4, chunk=16, most=2)
    instance.arrive("a", 8, 14, expected=0)
    instance.arrive("b", 8, 14, expected=0)
    held = _run(instance)
    assert {"a"} in held and {"b"} in held
    assert held.index({"b"}) > max(number for number, batch in enumerate(held) if batch == {"a"})


def test_whose_blocks_are_set_aside_counts_in_what_is_reserved() -> None:
    """When a ends, in 40 tokens, its five blocks are free again; b will have 20, and the new one 15, of 25."""
    batching = BatchingRules(admission=DecodeAdmission(AdmissionRule.RESERVE_DYNAMIC)).batching(25, BLOCK)
    batching.handle(SequenceComing("a", 20, 60), 0.0)
    assert batching.refusal(20, 70, 20) is None
    batching.handle(SequenceComing("b", 40, 90), 0.0)
    refused = batching.refusal(20, 70, 10)
    assert refused == "35 blocks in 40 tokens, when the first ends, of 25"
    batching.handle(SequenceLeft("b"), 0.0)
    assert batching.refusal(20, 70, 20) is None
    refused = batching.refusal(20, 70, 4)
    assert refused == "5 blocks for its tokens, 4 are free"


@pytest.mark.parametrize("order", PrefillOrder)
def test_a_new_instance_has_books_of_its_own(order: PrefillOrder) -> None:
    rules = BatchingRules(order=order)
    first, second = (rules.batching(10, BLOCK) for _ in range(2))
    first.handle(SequenceArrived("a", 5, 9), 0.0)
    assert (first.prompt_tokens, second.prompt_tokens) == (5, 0)
