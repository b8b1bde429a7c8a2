"""Who is let into a live instance: what is handed over waits for the rule, and a fixed batch is of whole answers."""

import asyncio
from pathlib import Path

import pytest

from common.language.settings import Batching, LanguageSettings
from common.policies.language.decode_admission import AdmissionRule
from common.policies.language.prefill_schedule import PrefillOrder
from common.runtime.process import CannotServe
from services.prefill.service import serve
from tests.component.chat_support import DECODE, PREFILL
from tests.component.language_support import gathered, known_prompts, language_stack, shown
from tests.support.language_instance import language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer


@pytest.mark.parametrize("rule", [AdmissionRule.RESERVE_STATIC, AdmissionRule.RESERVE_DYNAMIC])
async def test_what_is_handed_over_waits_until_the_rule_lets_it_in(
    nats_server: NatsServer, language_model: Path, rule: AdmissionRule
) -> None:
    """The answers are generate's, whether their keys and values were taken, or came too late and were recomputed."""
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(
            nats_server.url, "prefill-0", language_model, PREFILL, chunk_tokens=32, prefill_order=PrefillOrder.SRF
        ) as prefill,
        language_instance(
            nats_server.url, "decode-0", language_model, DECODE, kv_bytes=20 * BLOCK_BYTES, decode_admission=rule
        ) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        for _ in range(2):  # the second time the histogram knows how long answers are
            answers = await gathered(*(stack.text(prompt) for prompt in prompts))
            assert answers == [shown(expected) for expected in prompts.values()]
        await prefill.settled()
        await decode.settled()
        assert sum(decode.instance.receiving.outcomes.values()) == 2 * len(prompts)
        counted = stack.gateway.edge.metrics.render({}, 0, (), 0, True).decode()
        assert 'triptych_sequences_waiting{instance="decode-0"} 0.0' in counted
        assert f'triptych_preemptions_total{{instance="decode-0"}} {decode.model.engine.counts.preempted}.0' in counted
        engine = decode.model.engine
        assert engine.refusal(1, 10_000) is None and not engine.waiting


async def test_fixed_batches_give_the_same_answers(nats_server: NatsServer, language_model: Path) -> None:
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(
            nats_server.url, "decode-0", language_model, batching=Batching.FIXED, fixed_batch=4
        ) as instance,
    ):
        await stack.served("decode-0")
        answers = await gathered(*(stack.text(prompt) for prompt in prompts))
        assert answers == [shown(expected) for expected in prompts.values()]
        await instance.settled()


async def test_a_fixed_batch_is_refused_where_an_instance_has_one_role() -> None:
    with pytest.raises(CannotServe, match="TRIPTYCH_BATCHING"):
        await serve(LanguageSettings(batching=Batching.FIXED), asyncio.Event())
