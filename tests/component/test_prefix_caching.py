"""What an engine finds in its memory it does not compute again, and nobody could tell from the answers."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from common.engine import Engine, Output, Request
from common.engine.request import alternatives
from common.mempool.address import BLOCK_TOKENS
from common.mempool.caching import Caching
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier, disk_tier, dram_tier
from common.messages.chat import pack_tokens
from common.models.causal_lm import KVPool
from common.models.causal_lm.sampling import SamplingParameters
from tests.support.causal_lms import VOCABULARY, causal_lm, expected

ANSWER = 20
GREEDY = SamplingParameters(temperature=0, logprobs=1)
TOLERANCE = 1e-4


def engine_of(blocks: int, caching: Caching = Caching.PD_CACHING_3, chunk: int = 64, **colder: int) -> Engine:
    """``dram`` and ``disk``: how many blocks there are of each."""
    model = causal_lm("llama")
    pool = KVPool(model.layout, blocks)
    tiers = []
    if "dram" in colder:
        tiers.append(dram_tier(pool.blocks, colder["dram"] * model.layout.block_bytes))
    if "disk" in colder:
        tiers.append(disk_tier(pool.blocks, colder["disk"] * model.layout.block_bytes, Path("/var/tmp")))
    memory = MemPool("own", Tier.over(pool.blocks), [tier for tier in tiers if tier is not None])
    return Engine(model, pool, None, chunk, 64, memory, caching)


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(1, VOCABULARY) for _ in range(count)]


def answers(engine: Engine, *prompts: Sequence[int], most: int = ANSWER) -> list[list[Output]]:
    """All at once."""
    found: dict[str, list[Output]] = {str(number): [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        engine.add(str(number), Request(pack_tokens(prompt), most, GREEDY), 0.0)
    while engine.busy:
        for output in engine.step(0.0):
            found[output.sequence].append(output)
    return list(found.values())


def check(outputs: Sequence[Output], prompt: Sequence[int]) -> list[int]:
    """The answer, which is generate's."""
    theirs = expected("llama", tuple(prompt), len(outputs))
    for output, token, logprob, margin in zip(outputs, theirs.tokens, theirs.logprobs, theirs.margins, strict=True):
        assert output.sampled.token == token or margin < TOLERANCE
        assert output.sampled.logprob == pytest.approx(logprob, abs=TOLERANCE)
    return [output.sampled.token for output in outputs]


def known(count: int) -> int:
    """How many of a sequence's first ``count`` tokens can be found: whole blocks, and never its last token."""
    return max(0, count - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_conversations_later_turns_compute_only_what_is_new() -> None:
    chance = random.Random(1)
    engine = engine_of(64)
    prompt: list[int] = []
    before = 0
    for turn in range(4):
        prompt += tokens(chance, 21)
        prefilled = engine.counts.prefilled
        (outputs,) = answers(engine, prompt)
        # Of the turn before, all is known but its last token.
        assert [output.cached_tokens for output in outputs] == [known(before)] + [0] * (ANSWER - 1)
        assert engine.counts.prefilled - prefilled == len(prompt) - known(before)
        prompt += check(outputs, prompt)
        before = len(prompt)
        assert turn or engine.counts.found == 0
    assert engine.memory.available_blocks == 64


@pytest.mark.parametrize("caching", list(Caching))
def test_a_shared_system_prompt_is_computed_once_by_whoever_comes_at_once(caching: Caching) -> None:
    chance = random.Random(2)
    engine = engine_of(64, caching)
    system = tokens(chance, 3 * BLOCK_TOKENS)
    prompts = [system + tokens(chance, 9) for _ in range(6)]
    for outputs, prompt in zip(answers(engine, *prompts), prompts, strict=True):
        check(outputs, prompt)
    once = len(system) + 6 * 9
    assert engine.counts.prefilled == (6 * (len(system) + 9) if caching is Caching.PD_BASIC else once)


def test_several_answers_to_one_prompt_compute_it_once_and_share_its_blocks() -> None:
    prompt = tokens(random.Random(3), 4 * BLOCK_TOKENS + 3)
    engine = engine_of(12, chunk=128)
    request = Request(pack_tokens(prompt), 4, SamplingParameters(seed=9))
    for number, one in enumerate(alternatives(request, 5)):
        engine.add(str(number), one, 0.0)
    engine.step(0.0)
    engine.step(0.0)
    # The prompt's whole blocks are held once, and each answer has one of its own.
    assert engine.allocator.held_blocks == 4 + 5
    while engine.busy:
        engine.step(0.0)
    assert engine.counts.prefilled == len(prompt) + 4 * 3 and engine.counts.found == 4 * 4 * BLOCK_TOKENS


def test_what_is_kept_is_evicted_before_anybody_is_preempted() -> None:
    chance = random.Random(4)
    engine = engine_of(8)
    for length in (40, 50, 60):
        prompt = tokens(chance, length)
        check(answers(engine, prompt)[0], prompt)
    assert engine.counts.prefilled == 150 and engine.allocator.idle_blocks > 4
    prompts = [tokens(chance, 40) for _ in range(2)]
    for outputs, prompt in zip(answers(engine, *prompts), prompts, strict=True):
        check(outputs, prompt)
    # Whoever is preempted is prefilled again.
    assert engine.counts.prefilled == 150 + 80


def test_who_is_preempted_or_cancelled_finds_again_what_was_computed() -> None:
    chance = random.Random(5)
    engine = engine_of(9, chunk=32)
    prompts = [tokens(chance, 60) for _ in range(2)]
    for outputs, prompt in zip(answers(engine, *prompts, most=24), prompts, strict=True):
        check(outputs, prompt)
    assert engine.counts.found > 0
    engine = engine_of(16, chunk=32)
    engine.add("gone", Request(pack_tokens(prompts[0]), 5, GREEDY), 0.0)
    engine.step(0.0)
    engine.cancel("gone", 0.0)
    check(answers(engine, prompts[0])[0], prompts[0])
    assert engine.counts.found == 32 and engine.counts.prefilled == 60


@cache
def found_again(**colder: int) -> int:
    """How many tokens of four chats are found whose turns are so far apart that what they had has been evicted."""
    chance = random.Random(6)
    engine = engine_of(8, **colder)
    system = tokens(chance, 2 * BLOCK_TOKENS)
    chats = [list(system) for _ in range(4)]
    for _ in range(3):
        for chat in chats:
            chat += tokens(chance, 7)
            chat += check(answers(engine, chat, most=6)[0], chat)
    for tier in engine.memory.tiers.values():
        assert tier.allocator.free_blocks + tier.allocator.idle_blocks == tier.allocator.blocks
    return engine.counts.found


@pytest.mark.parametrize("colder", [{"dram": 6}, {"dram": 3, "disk": 20}, {"disk": 20}])
def test_answers_are_the_same_from_every_tier_and_more_is_found(colder: dict[str, int]) -> None:
    assert found_again(**colder) > found_again() > 0


def test_without_caching_nothing_is_kept() -> None:
    engine = engine_of(8, Caching.PD_BASIC)
    prompt = tokens(random.Random(7), 40)
    for _ in range(2):
        check(answers(engine, prompt)[0], prompt)
    assert engine.allocator.free_blocks == 8 and engine.counts.prefilled == 80
