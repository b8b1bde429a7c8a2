"""What is predicted of an answer's length in a prefill instance reaches the decode instance, in either mode."""

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from common.bus.nats_bus import NatsBus
from common.engine import Engine
from common.language.foretelling import Foretelling, told
from common.language.settings import LengthPrediction
from common.messages.chat import ExpectedAnswer, TokensGenerated, pack_tokens
from common.messages.cluster import LanguageRole
from common.messages.subjects import TOKENS_GENERATED
from common.models.length_predictor import AnswerLengths, LengthPredictor
from common.models.length_predictor.network import LengthNetwork, NetworkShape
from common.policies.language.decode_admission import AdmissionRule, VictimRule
from common.policies.language.length_prediction import LengthBuckets, LengthRange
from common.policies.language.prefill_schedule import PrefillOrder
from tests.component.chat_support import DECODE, PREFILL
from tests.component.language_support import gathered, known_prompts, language_stack, shown
from tests.support.asking import asker
from tests.support.bus import eventually
from tests.support.language import FUSED
from tests.support.language_instance import language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer
from tests.support.sequences import sequence

_BUCKETS = LengthBuckets(granularity=10, buckets=4)


@pytest.fixture
def with_predictor(language_model: Path, tmp_path: Path) -> Path:
    """The test model with a predictor beside it that has learnt nothing: it says something all the same."""
    folder = tmp_path / language_model.name
    shutil.copytree(language_model, folder)
    torch.manual_seed(4)
    shape = NetworkShape(rows=64, window=32, classes=_BUCKETS.buckets, width=8, channels=16, hidden=16)
    LengthPredictor(LengthNetwork(shape), _BUCKETS).save(folder)
    return folder


@pytest.mark.parametrize("mode", [LengthPrediction.PARALLEL, LengthPrediction.SEQUENTIAL])
async def test_what_the_predictor_says_is_told(with_predictor: Path, mode: LengthPrediction) -> None:
    lengths = AnswerLengths.of_model(with_predictor, LengthBuckets())
    assert lengths.predictor is not None
    prompt = pack_tokens(range(20))
    foretelling = Foretelling(lengths, mode)
    try:
        held = sequence("a", prompt)
        await foretelling.begin(held)
        assert held.expected is not None
        assert held.expected.done() or mode is LengthPrediction.PARALLEL
        said = await told(held.expected)
        assert said is not None
        expected = lengths.predictor.range(prompt)
        assert (said.low, said.high, said.source) == (expected.low, expected.high, "predictor")
        assert foretelling.expected_tokens(held, said) == 20 + min(8, expected.low)
    finally:
        foretelling.close()


async def test_where_nothing_is_told_the_answers_that_ended_here_count(language_model: Path) -> None:
    foretelling = Foretelling(AnswerLengths.of_model(language_model, _BUCKETS), LengthPrediction.PARALLEL)
    held = sequence("a", pack_tokens(range(20)))
    await foretelling.begin(held)
    assert await told(held.expected) is None
    assert foretelling.expected_tokens(held, None) == 20
    held.answered += pack_tokens(range(25))
    for _ in range(8):
        foretelling.ended(held)
    assert foretelling.likely_tokens(20, None) == 40
    assert foretelling.expected_tokens(held, None) == 28  # no more than it asks for
    assert foretelling.expected_tokens(held, ExpectedAnswer(low=5, high=10, source="test")) == 25
    foretelling.close()


@pytest.mark.parametrize("mode", list(LengthPrediction))
async def test_predictions_go_from_prefill_to_decode(
    nats_server: NatsServer, with_predictor: Path, mode: LengthPrediction
) -> None:
    prompts = known_prompts(with_predictor)
    # So small a pool that whoever is expected to be longest leaves now and then: the answers stay the same.
    pool = {"kv_bytes": 24 * BLOCK_BYTES, "victim_rule": VictimRule.LONGEST_REMAINING}
    async with (
        language_stack(nats_server.url, with_predictor) as stack,
        language_instance(
            nats_server.url, "prefill-0", with_predictor, PREFILL, chunk_tokens=32, length_prediction=mode
        ) as prefill,
        language_instance(
            nats_server.url, "decode-0", with_predictor, DECODE, length_prediction=mode, **pool
        ) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        answers = await gathered(*(stack.text(prompt) for prompt in prompts))
        assert answers == [shown(expected) for expected in prompts.values()]
        await prefill.settled()
        await decode.settled()
        taken = decode.instance.receiving.outcomes["taken"]
        assert taken
        assert decode.instance.foretelling.sources == ({} if mode is LengthPrediction.OFF else {"predictor": taken})


async def test_a_fused_instance_that_reserves_predicts_for_itself(
    nats_server: NatsServer, with_predictor: Path
) -> None:
    prompts = known_prompts(with_predictor)
    rules = {"decode_admission": AdmissionRule.RESERVE_DYNAMIC, "prefill_order": PrefillOrder.SJF}
    async with (
        language_stack(nats_server.url, with_predictor) as stack,
        language_instance(
            nats_server.url,
            "decode-0",
            with_predictor,
            kv_bytes=24 * BLOCK_BYTES,
            chunk_tokens=32,
            **rules,
        ) as fused,
    ):
        await stack.served("decode-0")
        answers = await gathered(*(stack.text(prompt) for prompt in prompts))
        assert answers == [shown(expected) for expected in prompts.values()]
        await fused.settled()
        assert fused.instance.foretelling.sources == {"predictor": len(prompts)}


@pytest.mark.parametrize("mode", list(LengthPrediction))
async def test_what_goes_on_where_it_was_prefilled_does_so_by_its_prediction(
    nats_server: NatsServer, with_predictor: Path, mode: LengthPrediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = known_prompts(with_predictor)
    predictor = AnswerLengths.of_model(with_predictor, LengthBuckets()).predictor
    assert predictor is not None
    expect, resume = Engine.expect, Engine.resume
    told_of: dict[str, int] = {}
    resumed_by: list[int] = []

    def expecting(engine: Engine, name: str, expected_tokens: int, now_s: float) -> None:
        told_of[name] = expected_tokens
        expect(engine, name, expected_tokens, now_s)

    def resuming(engine: Engine, name: str, now_s: float) -> None:
        resumed_by.append(told_of[name])
        resume(engine, name, now_s)

    monkeypatch.setattr(Engine, "expect", expecting)
    monkeypatch.setattr(Engine, "resume", resuming)
    async with (
        asker(nats_server.url) as asking,
        language_instance(nats_server.url, "decode-0", with_predictor, length_prediction=mode) as fused,
    ):
        answers = await asyncio.gather(
            *(asking.ask(prompt, len(answer), "decode-0", decode="") for prompt, answer in prompts.items())
        )
        assert [answer.tokens for answer in answers] == list(prompts.values())
        await fused.settled()
    if mode is LengthPrediction.OFF:
        assert set(resumed_by) == {0} and not fused.instance.foretelling.sources
        return
    lengths = {prompt: predictor.range(pack_tokens(prompt)).low for prompt in prompts}
    assert sorted(resumed_by) == sorted(len(one) + min(len(prompts[one]), low) for one, low in lengths.items())
    assert fused.instance.foretelling.sources == {"predictor": len(prompts)}


@pytest.mark.parametrize("roles", [{"prefill-0": PREFILL, "decode-0": DECODE}, {"decode-0": FUSED}])
async def test_one_prompt_that_fails_costs_nobody_else_anything(
    nats_server: NatsServer,
    with_predictor: Path,
    roles: dict[str, tuple[LanguageRole, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = known_prompts(with_predictor)
    failing = pack_tokens(next(iter(prompts)))
    predict = LengthPredictor.range
    tries: list[bytes] = []

    def failing_once(predictor: LengthPredictor, prompt: bytes) -> LengthRange:
        if prompt == failing and not tries:
            tries.append(prompt)
            raise RuntimeError("no prediction for this one")
        return predict(predictor, prompt)

    monkeypatch.setattr(LengthPredictor, "range", failing_once)
    told: list[TokensGenerated] = []
    async with (
        await NatsBus.connect(nats_server.url, name="listener") as bus,
        language_stack(nats_server.url, with_predictor) as stack,
        contextlib.AsyncExitStack() as opened,
    ):
        await bus.subscribe(TOKENS_GENERATED, told.append, "gateway-0")
        rules = {"decode_admission": AdmissionRule.RESERVE_DYNAMIC, "chunk_tokens": 32}
        instances = [
            await opened.enter_async_context(language_instance(nats_server.url, name, with_predictor, own, **rules))
            for name, own in roles.items()
        ]
        await stack.served(*roles)
        assert await gathered(*map(stack.text, prompts)) == [shown(expected) for expected in prompts.values()]
        for one in instances:
            await one.settled()
        await eventually(lambda: not any(one.instance.sequences or one.model.engine.busy for one in instances))
        await eventually(lambda: _failures(told))
    assert _failures(told) == [("task_failed", True)] and len(tries) == 1


def _failures(told: list[TokensGenerated]) -> list[tuple[str, bool]]:
    failures = [one.failure for news in told for one in news.sequences if one.failure is not None]
    return [(failure.code, failure.retryable) for failure in failures]


async def test_without_a_predictor_the_decode_instance_counts(nats_server: NatsServer, language_model: Path) -> None:
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "prefill-0", language_model, PREFILL),
        language_instance(nats_server.url, "decode-0", language_model, DECODE) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        await gathered(*(stack.text(prompt) for prompt in prompts))
        await decode.settled()
        assert decode.instance.foretelling.sources == {"histogram": len(prompts)}
