"""Fused instances behind a real gateway and scheduler: the answers are generate's, and the books balance."""

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest

from common.bus.nats_bus import NatsBus
from common.messages.chat import FindGeneration, TokensGenerated
from common.messages.subjects import FIND_GENERATION, TOKENS_GENERATED
from tests.component.language_support import gathered, known_prompts, language_stack, shown
from tests.support.asking import asker
from tests.support.language import WAIT_S, text_of
from tests.support.language_instance import language_instance
from tests.support.language_model import BLOCK_BYTES, greedy
from tests.support.nats_server import NatsServer


async def test_a_streamed_chat_is_what_generate_answers(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, chunk_tokens=16) as served,
    ):
        await stack.served("decode-0")
        messages = [{"role": "user", "content": "say hello"}]
        tokenizer = stack.gateway.edge.language.tokenizer
        prompt = tuple(tokenizer.encode_chat(messages, {}))
        stream = await stack.client.chat.completions.create(
            model=stack.model, messages=messages, temperature=0, max_tokens=40, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == shown(greedy(language_model, prompt, 40).tokens)
        assert text_of(list(prompt)).endswith("<|assistant|>")
        for number, (known, answer) in enumerate(known_prompts(language_model).items()):
            text = await stack.text(known, 24)
            assert text == shown(answer[:24]), number
        await served.settled()


async def test_many_clients_of_whom_some_leave_and_the_books_balance(
    nats_server: NatsServer, language_model: Path
) -> None:
    chance = random.Random(5)
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        # So small that sequences are preempted.
        language_instance(
            nats_server.url, "decode-0", language_model, chunk_tokens=64, kv_bytes=40 * BLOCK_BYTES
        ) as served,
    ):
        await stack.served("decode-0")
        assert served.books.blocks == 40

        async def client(prompt: tuple[int, ...], leaves: bool) -> bool:
            stream = await stack.stream(prompt, 48)
            text = ""
            left = chance.randrange(6)
            async for chunk in stream:
                text += chunk.choices[0].text
                left -= 1
                if leaves and left < 0:
                    await stream.close()
                    return False
            assert text == shown(prompts[prompt][:48])
            return True

        everybody = [client(chance.choice(list(prompts)), chance.random() < 0.5) for _ in range(210)]
        stayed = await gathered(*everybody)
        assert sum(stayed) < len(stayed)
        await served.settled()
        assert served.books.set_aside_blocks == 0
        assert not served.model.engine.busy


async def test_an_instance_that_leaves_has_its_sequences_go_on_elsewhere(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, drain_s=0.0) as leaving,
        language_instance(nats_server.url, "decode-1", language_model),
    ):
        await stack.served("decode-0", "decode-1")
        answers = [asyncio.create_task(stack.text(prompt)) for prompt in prompts]
        async with asyncio.timeout(60):
            while not leaving.books.held_blocks and not all(answer.done() for answer in answers):  # noqa: ASYNC110 - the books have no bell
                await asyncio.sleep(0.001)
        leaving.stop.set()
        for text, expected in zip(await gathered(*answers), prompts.values(), strict=True):
            assert text == shown(expected)


async def test_what_cannot_be_answered_is_refused(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, kv_bytes=8 * BLOCK_BYTES) as served,
    ):
        await stack.served("decode-0")
        assert (await stack.client.models.list()).data[0].id == stack.model
        with pytest.raises(openai.BadRequestError, match="128"):
            await stack.client.completions.create(model=stack.model, prompt=[1] * 100, max_tokens=100)
        await served.settled()


async def test_what_an_instance_says_that_it_has_sent_is_sent(
    nats_server: NatsServer, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway takes for lost what an instance has come to the end of, and it has not heard."""
    sending, free = asyncio.Event(), asyncio.Event()

    class HeldUp(NatsBus):
        async def publish(self, subject: Any, body: Any, *tokens: str) -> None:
            if isinstance(body, TokensGenerated):
                sending.set()
                await free.wait()
            await super().publish(subject, body, *tokens)

    monkeypatch.setattr("common.runtime.worker.NatsBus", HeldUp)
    prompt, expected = next(iter(known_prompts(language_model).items()))
    asked = FindGeneration(request_id="asked-1", epoch=1)
    async with (
        asker(nats_server.url) as asking,
        language_instance(nats_server.url, "decode-0", language_model),
        asyncio.timeout(WAIT_S),
    ):
        answer = asyncio.create_task(asking.ask(prompt, 1, "decode-0"))
        await sending.wait()
        finding = asyncio.create_task(asking.bus.request(FIND_GENERATION, asked, "decode-0", deadline_s=WAIT_S))
        # Whoever does not wait for what is being sent answers now.
        await asyncio.sleep(0.5)
        assert not finding.done()
        free.set()
        assert not (await finding).held
        assert (await answer).tokens == expected[:1]


async def test_a_step_is_one_message_and_one_that_fails_costs_no_stream(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    told: list[TokensGenerated] = []
    async with (
        await NatsBus.connect(nats_server.url, name="listener") as bus,
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model) as broken,
    ):
        await bus.subscribe(TOKENS_GENERATED, told.append, "gateway-0")
        await stack.served("decode-0")
        answers = await gathered(*(stack.text(prompt) for prompt in prompts))
        assert answers == [shown(expected) for expected in prompts.values()]
        assert max(len(news.sequences) for news in told) > 1
        for news in told:
            assert len({sequence.request_id for sequence in news.sequences}) == len(news.sequences)
        async with language_instance(nats_server.url, "decode-1", language_model):
            await stack.served("decode-1")
            pool = broken.model.engine.pool
            layers, pool.layers = pool.layers, []
            prompt, expected = next(iter(prompts.items()))
            assert await stack.text(prompt) == shown(expected)
            pool.layers = layers
            await broken.settled()
        await stack.lost("decode-1")
        assert await stack.text(prompt) == shown(expected)
