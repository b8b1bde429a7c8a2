"""The engine under every order of prompts, admission and batching: the answers are generate's, the books balance."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import Engine, Output, Request
from common.mempool.caching import Caching
from common.messages.chat import pack_tokens
from common.models.causal_lm import KVPool
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission
from common.policies.language.prefill_schedule import PrefillOrder
from tests.component.test_engine import ANSWER, GREEDY, PROMPTS, check_answer, memory_of, run_engine
from tests.support.causal_lms import VOCABULARY, causal_lm
from tests.unit.test_batching_rules import RULES


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    rules=RULES,
    chosen=st.lists(st.sampled_from(PROMPTS), min_size=2, max_size=7),
    chunk=st.sampled_from((5, 16, 33, 512)),
    blocks=st.integers(5, 16),
    most=st.integers(1, 6),
    apart=st.integers(0, 3),
    off=st.integers(-20, 20),
    seed=st.integers(0, 99),
    leaving=st.sampled_from((0.0, 0.05)),
    caching=st.sampled_from(Caching),
)
def test_greedy_answers_are_those_of_generate_whatever_the_rules(
    rules: BatchingRules,
    chosen: list[bytes],
    chunk: int,
    blocks: int,
    most: int,
    apart: int,
    off: int,
    seed: int,
    leaving: float,
    caching: Caching,
) -> None:
    """In pools so small that somebody is preempted; some are cancelled, wherever they are just then."""
    model = causal_lm("llama")
    pool, memory = memory_of(model, blocks, seed)
    engine = Engine(model, pool, None, chunk, most, memory, caching, rules)
    chance = random.Random(seed)
    answers: dict[str, list[Output]] = {}
    left = set[str]()

    def step() -> None:
        for output in engine.step(0.0):
            answers.setdefault(output.sequence, []).append(output)
        if chance.random() < leaving:
            left.add(name := str(chance.randrange(len(chosen))))
            engine.cancel(name, 0.0)

    for number, prompt in enumerate(chosen):
        request = Request(prompt, ANSWER, GREEDY)
        engine.add(str(number), request, 0.1 * number, max(0, request.computed_tokens + off))
        for _ in range(apart):
            step()
    for _ in range(3000):
        if not engine.busy:
            break
        step()
    assert not engine.busy and memory.available_blocks == blocks and not engine.waiting
    for number, prompt in enumerate(chosen):
        if str(number) not in left:
            check_answer(answers[str(number)], "llama", prompt)


# Prompts' lengths, and how many passes there are before each comes.
_ARRIVALS = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 2)), min_size=4, max_size=12)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    arrivals=_ARRIVALS,
    order=st.sampled_from((PrefillOrder.FCFS, PrefillOrder.SJF, PrefillOrder.LJF)),
    batch=st.integers(1, 4),
    chunk=st.sampled_from((16, 40)),
    blocks=st.integers(8, 120),
    admission=st.sampled_from(AdmissionRule),
)
def test_nobodys_first_token_is_after_those_of_more_than_a_batch_less_one_that_came_later(
    arrivals: list[tuple[int, int]],
    order: PrefillOrder,
    batch: int,
    chunk: int,
    blocks: int,
    admission: AdmissionRule,
) -> None:
    """TetriInfer, section 3.3.1, with the paper's PrefillSchedBatch: in the tokens that come, however few blocks."""
    rules = BatchingRules(order=order, batch=batch, admission=DecodeAdmission(admission))
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, blocks), None, chunk, rules=rules)
    chance = random.Random(batch)
    first: list[int] = []

    def step() -> None:
        for output in engine.step(0.0):
            if int(output.sequence) not in first:
                first.append(int(output.sequence))

    for number, (length, passes) in enumerate(arrivals):
        for _ in range(passes):
            step()
        prompt = pack_tokens(chance.randrange(1, VOCABULARY) for _ in range(length))
        engine.add(str(number), Request(prompt, 6, GREEDY), 0.0, length + 6)
    while engine.busy:
        step()
    assert sorted(first) == list(range(len(arrivals)))
    for place, number in enumerate(first):
        # Those of one pass have their tokens at once: none of them is after another.
        assert sum(other > number for other in first[:place]) <= batch - 1


@pytest.mark.parametrize("order", PrefillOrder)
@pytest.mark.parametrize("batch", [2, 16])
def test_every_chunk_is_full_but_the_last(order: PrefillOrder, batch: int) -> None:
    """TetriInfer, section 3.3.3: prompts are sliced and merged; only where no prompt waits is a chunk not full."""
    model = causal_lm("llama")
    rules = BatchingRules(order=order, batch=batch)
    engine = Engine(model, KVPool(model.layout, 60), None, 24, rules=rules)
    for number, prompt in enumerate((*PROMPTS, *PROMPTS)):
        engine.add(str(number), Request(prompt, 2, GREEDY), 0.1 * number)
    chunks = []
    answered = set[str]()
    while engine.busy:
        outputs = engine.step(0.0)
        computed = [piece.count for piece in engine.computed if piece.sequence not in answered]
        answered |= {output.sequence for output in outputs}
        chunks.append(sum(computed))
    whole = sum(len(prompt) // 4 for prompt in PROMPTS) * 2
    assert [count for count in chunks if count] == [24] * (whole // 24) + [whole % 24]


def test_a_short_prompt_goes_between_two_chunks_of_a_long_one() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 40), None, 16, rules=BatchingRules(order=PrefillOrder.SRF))
    engine.add("long", Request(PROMPTS[5], ANSWER, GREEDY), 0.0)
    engine.step(0.0)
    engine.add("short", Request(PROMPTS[1], ANSWER, GREEDY), 0.0)
    assert [output.sequence for output in engine.step(0.0)] == ["short"]
    answers = run_engine(engine)
    check_answer(answers["long"], "llama", PROMPTS[5])


def test_a_fixed_batch_is_answered_before_the_next_begins() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 60), None, 16, 2, rules=BatchingRules(fixed=True))
    for number in range(4):
        engine.add(str(number), Request(PROMPTS[number], ANSWER, GREEDY), 0.0)
    order = []
    answers: dict[str, list[Output]] = {}
    while engine.busy:
        for output in engine.step(0.0):
            order.append(int(output.sequence) // 2)
            answers.setdefault(output.sequence, []).append(output)
    assert order == sorted(order)
    for number in range(4):
        check_answer(answers[str(number)], "llama", PROMPTS[number])


def test_who_reserves_preempts_fewer() -> None:
    """TetriInfer, section 3.4: twelve sequences whose lengths are known, in a pool that holds some three of them."""

    def preempted(rule: AdmissionRule) -> int:
        model = causal_lm("llama")
        rules = BatchingRules(admission=DecodeAdmission(rule))
        engine = Engine(model, KVPool(model.layout, 20), None, 64, rules=rules)
        for number in range(12):
            request = Request(PROMPTS[1 + number % 4], 6 + 8 * (5 * number % 12), GREEDY)
            engine.add(str(number), request, 0.0)
            engine.expect(str(number), request.computed_tokens, 0.0)
        run_engine(engine)
        return engine.counts.preempted

    greedy, static, dynamic = (preempted(rule) for rule in AdmissionRule)
    assert 0 < static < dynamic < greedy
