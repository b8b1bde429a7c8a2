"""A video's prompt expanded by the language model: real gateway, scheduler and broker; played workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.bus.errors import Refusal
from common.bus.nats_bus import NatsBus
from common.messages.chat import unpack_tokens
from common.messages.cluster import Service, VideoModelInfo
from common.messages.failures import Failure, Stage
from common.messages.subjects import ENCODE_PROMPT, VIDEO_RECORDS
from common.messages.video import EncodePrompt, PromptEncoded
from gateway.expansion import MAX_TOKENS
from tests.component.chat_support import ChatStack, chat_stack
from tests.component.gateway_support import MODEL, VIDEO_SERVICES, member, stack, until
from tests.support.language import WAIT_S, text_of
from tests.support.nats_server import NatsServer
from tests.support.tiny_tokenizer import write_tokenizer

IDEA: dict[str, Any] = {"prompt": "ball go right, red", "expand_prompt": True}
CAPTION = "a red ball going right"


@contextlib.asynccontextmanager
async def video_workers(running: ChatStack, model: VideoModelInfo = MODEL) -> AsyncIterator[NatsBus]:
    """The video workers announce themselves; yields the test's own connection."""
    async with contextlib.AsyncExitStack() as opened:
        bus = await opened.enter_async_context(await NatsBus.connect(running.broker.url, name="test"))
        for service in VIDEO_SERVICES:
            slot = None if service is Service.ENCODER else 0
            await opened.enter_async_context(member(bus, service, slot=slot, model=model))

        async def offered() -> bool:
            return bool(running.gateway.edge.catalogue.video_models)

        await until(offered)
        yield bus


def multipart(fields: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, str(value))
    return form


async def test_the_encoder_reads_the_caption_and_the_record_keeps_both(nats_server: NatsServer, tmp_path: Path) -> None:
    asked: asyncio.Queue[EncodePrompt] = asyncio.Queue(10)

    async def encode(request: EncodePrompt) -> PromptEncoded:
        asked.put_nowait(request)
        raise Refusal(Failure(stage=Stage.ENCODER, code="played", message="this encoder only listens"))

    async with (
        chat_stack(nats_server, tmp_path, script=lambda prompt: " a red ball\n going  right\n") as s,
        video_workers(s) as bus,
    ):
        listening = await bus.serve(ENCODE_PROMPT, encode, "encoder-0")
        for number, body in enumerate(({"json": IDEA | {"negative_prompt": "rain"}}, {"data": multipart(IDEA)})):
            async with s.http.post("/v1/videos", **body) as response:
                created = await response.json()
                assert response.status == 200, created
            assert (created["prompt"], created["expanded_prompt"]) == (IDEA["prompt"], CAPTION)
            stored = (await bus.get(VIDEO_RECORDS, created["id"])).value.request
            assert (stored.prompt, stored.expanded_prompt) == (IDEA["prompt"], CAPTION)
            encoded = await asyncio.wait_for(asked.get(), WAIT_S)
            assert (encoded.prompt, encoded.negative_prompt) == (CAPTION, "" if number else "rain")
            async with s.http.get(f"/v1/videos/{created['id']}") as response:
                assert (await response.json())["expanded_prompt"] == CAPTION
            request = await s.workers["fused-0"].next_request()
            assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, MAX_TOKENS)
            assert text_of(unpack_tokens(request.tokens)) == f"<|user|>{IDEA['prompt']}<|end|><|assistant|>"
        for plain in ({"prompt": "a ball"}, {"prompt": "a ball", "expand_prompt": False}):
            status, created = await s.call("/v1/videos", **plain)
            assert (status, created["expanded_prompt"]) == (200, None)
        assert s.workers["fused-0"].requests.empty(), "nobody asked for these to be expanded"
        await listening.stop()


@pytest.mark.parametrize(
    ("answer", "why"),
    [("", "empty"), (" \n ", "blank"), ("hello " * 60, "cut off"), ("a caption too long", "over the prompt limit")],
)
async def test_without_a_usable_answer_the_prompt_stays(
    nats_server: NatsServer, tmp_path: Path, answer: str, why: str
) -> None:
    short = MODEL.model_copy(update={"max_prompt_tokens": 1})
    async with chat_stack(nats_server, tmp_path, script=lambda prompt: answer) as s, video_workers(s, short) as bus:
        status, created = await s.call("/v1/videos", prompt="ball right", expand_prompt=True)
        assert (status, created["prompt"], created["expanded_prompt"]) == (200, "ball right", None), why
        assert (await bus.get(VIDEO_RECORDS, created["id"])).value.request.caption == "ball right"


async def test_what_no_instance_can_answer_stays_too(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path) as s, video_workers(s):
        s.workers["fused-0"].faults.refuse = Failure(
            stage=Stage.PREFILL, code="context_length_exceeded", message="too long", retryable=False
        )
        status, created = await s.call("/v1/videos", **IDEA)
        assert (status, created["expanded_prompt"]) == (200, None)


async def test_while_the_language_model_is_away_nothing_is_ordered(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, expansion_s=0.5) as s, video_workers(s) as bus:
        await s.workers["fused-0"].leave()
        async with s.http.post("/v1/videos", json=IDEA) as response:
            error = (await response.json())["error"]
            assert (response.status, error["type"]) == (503, "server_error")
            assert int(response.headers["Retry-After"]) >= 1
        assert "leave 'expand_prompt' out" in error["message"]
        assert await bus.keys(VIDEO_RECORDS) == []
        async with s.http.post("/v1/videos", json={**IDEA, "steps": 10**6}) as response:
            assert response.status == 400, "what is wrong anyway is said without asking the language model"


async def test_before_the_language_model_is_there_one_is_told_to_come_back(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    tokenizer = str(write_tokenizer(tmp_path))
    async with stack(nats_server, VIDEO_SERVICES, language_model=tokenizer) as s:

        async def offered() -> bool:
            return bool(s.gateway.edge.catalogue.video_models)

        await until(offered)
        async with s.http.post("/v1/videos", json=IDEA) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "not_ready")
            assert int(response.headers["Retry-After"]) >= 1
        assert "no language model is ready" in error["message"]


async def test_what_the_language_model_cannot_take_is_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    async with chat_stack(nats_server, tmp_path, max_sequences=1) as s, video_workers(s) as bus:
        desk = s.gateway.edge.language
        assert desk is not None
        desk.active = 1
        status, body = await s.call("/v1/videos", **IDEA)
        assert (status, body["error"]["code"]) == (503, "overloaded")
        desk.active = 0
        desk.tokenizer.template = None
        status, body = await s.call("/v1/videos", **IDEA)
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "no_template", "expand_prompt")
        assert await bus.keys(VIDEO_RECORDS) == []
