"""The engine against transformers' generate: the same tokens for any chunk size, company, scatter and preemption."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import Engine, Finish, Output, Request
from common.engine.engine import RequestRefused
from common.engine.request import alternatives
from common.mempool.address import KEY_BYTES
from common.mempool.caching import Caching
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier
from common.messages.chat import pack_tokens, unpack_tokens
from common.models.causal_lm import CausalLM, KVPool
from common.models.causal_lm.sampling import SamplingParameters
from tests.support.causal_lms import CONTEXT, FAMILIES, VOCABULARY, causal_lm, expected

ANSWER = 12
GREEDY = SamplingParameters(temperature=0, logprobs=2)
# A difference below this in a float32 logit is rounding.
TOLERANCE = 1e-4


def _prompts() -> list[bytes]:
    chance = random.Random(11)
    return [pack_tokens(chance.randrange(1, VOCABULARY) for _ in range(length)) for length in (1, 15, 16, 30, 47, 64)]


PROMPTS = _prompts()


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> tuple[str, CausalLM]:
    return request.param, causal_lm(request.param)


def memory_of(model: CausalLM, blocks: int, scatter: int | None = None) -> tuple[KVPool, MemPool]:
    """A pool; or one of twice as many blocks, of which any half is used by somebody else."""
    pool = KVPool(model.layout, blocks if scatter is None else 2 * blocks)
    memory = MemPool("own", Tier.over(pool.blocks))
    if scatter is not None:
        taken = memory.alloc_mem(2 * blocks) or []
        memory.free_mem(random.Random(scatter).sample(taken, blocks))
    return pool, memory


def run_engine(engine: Engine) -> dict[str, list[Output]]:
    """Everything it has yet to say."""
    answers: dict[str, list[Output]] = {}
    for _ in range(3000):
        if not engine.busy:
            return answers
        for output in engine.step(0.0):
            answers.setdefault(output.sequence, []).append(output)
    raise AssertionError("the engine does not come to an end")


def check_answer(outputs: list[Output], family: str, prompt: bytes, whole: bool = True) -> None:
    """Token for token; only where two tokens are equal but for rounding may the answers part."""
    theirs = expected(family, tuple(unpack_tokens(prompt)), ANSWER)
    for output, token, logprob, margin in zip(outputs, theirs.tokens, theirs.logprobs, theirs.margins, strict=True):
        if output.sampled.token != token:
            assert margin < TOLERANCE
            return
        assert output.sampled.logprob == pytest.approx(logprob, abs=TOLERANCE)
        assert output.sampled.top[0] == (token, output.sampled.logprob)
    assert [output.finish for output in outputs] == [None] * (ANSWER - 1) + [Finish.LENGTH if whole else None]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6),
    chunk=st.sampled_from((1, 5, 16, 33, 512)),
    blocks=st.integers(5, 24),
    most=st.integers(1, 6),
    apart=st.integers(0, 4),
    scatter=st.none() | st.integers(0, 99),
    caching=st.sampled_from(Caching),
)
def test_greedy_answers_are_those_of_generate(
    served: tuple[str, CausalLM],
    chosen: list[bytes],
    chunk: int,
    blocks: int,
    most: int,
    apart: int,
    scatter: int | None,
    caching: Caching,
) -> None:
    family, model = served
    pool, memory = memory_of(model, blocks, scatter)
    engine = Engine(model, pool, None, chunk, most, memory, caching)
    answers: dict[str, list[Output]] = {}
    for number, prompt in enumerate(chosen):
        engine.add(str(number), Request(prompt, ANSWER, GREEDY), 0.0)
        for _ in range(apart):
            for output in engine.step(0.0):
                answers.setdefault(output.sequence, []).append(output)
    for name, outputs in run_engine(engine).items():
        answers.setdefault(name, []).extend(outputs)
    for number, prompt in enumerate(chosen):
        check_answer(answers[str(number)], family, prompt)
    assert memory.available_blocks == blocks and not engine.allocator.set_aside_blocks


def test_a_pool_too_small_for_all_preempts_and_changes_nothing() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 6), chunk_tokens=32)
    for number in range(4):
        engine.add(str(number), Request(PROMPTS[2], ANSWER, GREEDY), 0.0)
    passes = sum(1 for _ in iter(lambda: (engine.busy and engine.step(0.0), engine.busy)[1], False))
    assert passes > ANSWER
    engine = Engine(model, KVPool(model.layout, 6), chunk_tokens=32)
    for number in range(4):
        engine.add(str(number), Request(PROMPTS[2], ANSWER, GREEDY), 0.0)
    for outputs in run_engine(engine).values():
        check_answer(outputs, "llama", PROMPTS[2])


def test_forks_that_share_their_prompts_blocks_are_preempted_one_by_one() -> None:
    """A victim frees only what it has for itself alone, and what is left of the pool is never given out twice."""
    model = causal_lm("llama")
    prompt = PROMPTS[4][: 2 * KEY_BYTES]
    pool, memory = memory_of(model, 6)
    engine = Engine(model, pool, None, 64, memory=memory, caching=Caching.PD_CACHING_1)
    engine.add("prompt", Request(prompt, 2, GREEDY, park=True), 0.0)
    first = run_engine(engine)["prompt"]
    forks = [str(number) for number in range(3)]
    for name in forks:
        shared = memory.match(prompt, hold=True)
        assert len(shared) == 2
        answered = pack_tokens((first[0].sampled.token,))
        engine.adopt(name, Request(prompt, ANSWER + 8, GREEDY, answered=answered), shared, 0.0)
    engine.cancel("prompt", 0.0)
    # Two shared blocks and four others: the three forks have room for one more block each, and then one for them all.
    answers = run_engine(engine)
    for name in forks:
        check_answer(first + answers[name][: ANSWER - 1], "llama", prompt, whole=False)
        assert len(answers[name]) == ANSWER + 7
    assert memory.available_blocks == 6


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_company() -> None:
    model = causal_lm("llama")
    request = Request(PROMPTS[3], ANSWER, SamplingParameters(seed=5, top_p=0.9))

    def drawn(company: int, chunk: int) -> list[list[int]]:
        engine = Engine(model, KVPool(model.layout, 40), chunk_tokens=chunk)
        for number, one in enumerate(alternatives(request, 3)):
            engine.add(str(number), one, 0.0)
        for number in range(company):
            engine.add(f"other {number}", Request(PROMPTS[number], 5), 0.0)
        answers = run_engine(engine)
        return [[output.sampled.token for output in answers[str(number)]] for number in range(3)]

    alone = drawn(0, 512)
    assert drawn(3, 7) == alone
    assert alone[0] != alone[1] != alone[2] != alone[0]


def test_a_cancelled_answer_leaves_its_blocks() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 8), chunk_tokens=8)
    for name in "ab":
        engine.add(name, Request(PROMPTS[3], ANSWER, GREEDY), 0.0)
    engine.step(0.0)
    engine.cancel("a", 0.0)
    engine.cancel("a", 0.0)
    answers = run_engine(engine)
    assert set(answers) == {"b"}
    check_answer(answers["b"], "llama", PROMPTS[3])
    assert engine.allocator.free_blocks == 8


def test_what_never_fits_is_refused() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 4))
    with pytest.raises(RequestRefused, match="the pool has 4"):
        engine.add("a", Request(pack_tokens((1,) * 60), 6), 0.0)
    with pytest.raises(RequestRefused, match="context"):
        engine.add("a", Request(pack_tokens((1,) * 60), CONTEXT), 0.0)
    with pytest.raises(RequestRefused, match="tokenizer"):
        engine.add("a", Request(pack_tokens((1,)), 2, stops=("x",)), 0.0)
    with pytest.raises(ValueError, match="room for one token"):
        Request(b"", 2)
    engine.add("a", Request(pack_tokens((1,) * 60), 5), 0.0)
    with pytest.raises(ValueError, match="already"):
        engine.add("a", Request(pack_tokens((1,)), 5), 0.0)
    assert len(run_engine(engine)["a"]) == 5


def test_an_answer_goes_on_in_another_engine_with_the_keys_and_values_of_the_first() -> None:
    model = causal_lm("llama")
    prompt = PROMPTS[4]
    first, second = (Engine(model, KVPool(model.layout, 12), chunk_tokens=16) for _ in range(2))
    first.add("a", Request(prompt, ANSWER, GREEDY, park=True), 0.0)
    first.add("other", Request(PROMPTS[1], 3, GREEDY), 0.0)
    outputs = run_engine(first)["a"]
    assert len(outputs) == 1 and outputs[0].finish is None and not first.busy
    table = first.parked("a")
    assert table is not None and first.parked("other") is None
    addresses = second.memory.alloc_mem(len(table.blocks) + 1) or []
    second.pool.blocks[[one.block for one in addresses[:-1]]] = first.pool.blocks[table.blocks]
    answered = pack_tokens((outputs[0].sampled.token,))
    second.adopt("a", Request(prompt, ANSWER, GREEDY, answered=answered), addresses, 0.0)
    # In the middle, it is taken back and computed anew.
    for _ in range(4):
        outputs += second.step(0.0)
    second.cancel("a", 0.0)
    answered = pack_tokens(output.sampled.token for output in outputs)
    second.add("a", Request(prompt, ANSWER, GREEDY, answered=answered), 0.0)
    check_answer(outputs + run_engine(second)["a"], "llama", prompt)
    first.cancel("a", 0.0)
    for engine in (first, second):
        assert engine.allocator.free_blocks == 12


def test_a_step_that_failed_leaves_an_engine_that_can_go_on() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 12))
    engine.add("parked", Request(PROMPTS[0], 2, GREEDY, park=True), 0.0)
    run_engine(engine)
    engine.add("lost", Request(PROMPTS[2], ANSWER, GREEDY), 0.0)
    layers, engine.pool.layers = engine.pool.layers, []
    with pytest.raises(IndexError):
        engine.step(0.0)
    engine.pool.layers = layers
    assert engine.abandon() == ["lost"]
    assert engine.parked("parked") is not None and engine.allocator.held_blocks == 1
    engine.add("lost", Request(PROMPTS[2], ANSWER, GREEDY), 0.0)
    check_answer(run_engine(engine)["lost"], "llama", PROMPTS[2])


def test_steps_without_a_free_block_are_stalled() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 4))
    held = engine.allocator.allocate(4) or []
    engine.add("a", Request(PROMPTS[1], 3, GREEDY), 0.0)
    assert engine.step(0.0) == [] and engine.stalled
    engine.allocator.release(held)
    assert len(engine.step(0.0)) == 1 and not engine.stalled


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5),
    chunk=st.sampled_from((5, 33, 512)),
    blocks=st.integers(7, 24),
    chances=st.integers(0, 99),
    caching=st.sampled_from(Caching),
)
def test_what_stands_still_for_a_while_goes_on_as_if_it_had_not(
    chosen: list[bytes], chunk: int, blocks: int, chances: int, caching: Caching
) -> None:
    """Between any two steps some are parked, others resumed; blocks are too few for all."""
    model = causal_lm("llama")
    pool, memory = memory_of(model, blocks)
    engine = Engine(model, pool, None, chunk, 8, memory, caching)
    chance = random.Random(chances)
    names = [str(number) for number in range(len(chosen))]
    for name, prompt in zip(names, chosen, strict=True):
        engine.add(name, Request(prompt, ANSWER, GREEDY), 0.0)
    answers: dict[str, list[Output]] = {name: [] for name in names}
    parked: set[str] = set()
    for _ in range(60):
        parked |= {name for name in names if chance.random() < 0.3 and engine.park(name, 0.0) is not None}
        for name in [name for name in sorted(parked) if chance.random() < 0.4]:
            engine.resume(name, 0.0)
            parked.discard(name)
        before = {name: len(answers[name]) for name in parked}
        for output in engine.step(0.0) if engine.busy else ():
            answers[output.sequence].append(output)
        assert all(len(answers[name]) == count and engine.parked(name) for name, count in before.items())
    for name in parked:
        engine.resume(name, 0.0)
    for name, outputs in run_engine(engine).items():
        answers[name].extend(outputs)
    for name, prompt in zip(names, chosen, strict=True):
        check_answer(answers[name], "llama", prompt)
    assert memory.available_blocks == blocks and not engine.allocator.set_aside_blocks


def test_only_what_runs_can_be_parked() -> None:
    model = causal_lm("llama")
    engine = Engine(model, KVPool(model.layout, 12), chunk_tokens=16)
    engine.add("long", Request(PROMPTS[-1], ANSWER, GREEDY), 0.0)
    assert engine.waits("long") and engine.park("long", 0.0) is None
    engine.step(0.0)
    assert not engine.waits("long") and engine.park("long", 0.0) is None
    for _ in range(3):
        engine.step(0.0)
    table = engine.park("long", 0.0)
    assert table is not None and engine.parked("long") is table and not engine.busy
    assert engine.park("long", 0.0) is None and engine.park("unknown", 0.0) is None
    engine.cancel("long", 0.0)
    engine.resume("long", 0.0)
    assert not engine.busy and engine.allocator.free_blocks == 12
