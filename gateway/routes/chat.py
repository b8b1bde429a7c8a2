"""Chat completions and completions, at once or as they come."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from uuid import uuid4

from aiohttp import web

from common.messages.chat import pack_tokens
from common.messages.cluster import LanguageModelInfo
from gateway.bodies import parse_fields, read_fields
from gateway.chat import answers
from gateway.chat.answers import ChatForm, CompletionForm, Form, Tally
from gateway.chat.asked import Asked, resolve, supported
from gateway.chat.desk import LanguageDesk
from gateway.chat.generation import GenerationFailed
from gateway.chat.prompts import read_messages, read_prompts
from gateway.chat.schemas import MAX_SEQUENCES, CreateChatCompletion, CreateCompletion
from gateway.chat.template import TemplateRefusal
from gateway.chat.text import Piece
from gateway.edge import EDGE, Edge
from gateway.errors import ApiError, internal, invalid, try_again
from gateway.routing import json_response

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_RANDOM_SEEDS = 2**63


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    edge = request.app[EDGE]
    desk = _desk(edge)
    fields = await read_fields(request, edge.settings.body_deadline_s, frozenset())
    ask = parse_fields(CreateChatCompletion, supported(fields, chat=True))
    info = _model(edge, ask.model)
    if desk.tokenizer.template is None:
        raise invalid(
            "messages",
            f"{info.name} has no chat template, so it takes no messages; use /v1/completions.",
            "no_template",
        )
    messages = read_messages(ask.messages)
    try:
        prompt = await desk.encode_chat(messages, ask.chat_template_kwargs or {})
    except TemplateRefusal as refusal:
        raise invalid(
            "messages", f"{info.name}'s chat template does not take these messages: {refusal}.", "template_refused"
        ) from refusal
    asked = resolve(ask, [prompt], info, secrets.randbelow(_RANDOM_SEEDS))
    answer_id = f"chatcmpl-{uuid4().hex}"
    form = ChatForm(answer_id, int(time.time()), info.name, desk.tokenizer.pieces, asked.sampling.logprobs is not None)
    return await _answer(request, edge, desk, answer_id, asked, form)


async def create_completion(request: web.Request) -> web.StreamResponse:
    edge = request.app[EDGE]
    desk = _desk(edge)
    fields = await read_fields(request, edge.settings.body_deadline_s, frozenset())
    ask = parse_fields(CreateCompletion, supported(fields, chat=False))
    info = _model(edge, ask.model)
    prompts = await _prompts(desk, ask)
    asked = resolve(ask, prompts, info, secrets.randbelow(_RANDOM_SEEDS))
    answer_id = f"cmpl-{uuid4().hex}"
    logprobs = asked.sampling.logprobs is not None
    form = CompletionForm(answer_id, int(time.time()), info.name, desk.tokenizer.pieces, logprobs)
    return await _answer(request, edge, desk, answer_id, asked, form)


def _desk(edge: Edge) -> LanguageDesk:
    if edge.draining.is_set():
        raise try_again("This server is shutting down and takes no new chats.", "draining", edge.settings.retry_after_s)
    if edge.language is None:
        raise ApiError(
            404,
            "This server has no language model: set TRIPTYCH_LANGUAGE_MODEL to a local folder or a hub name.",
            code="model_not_found",
            param="model",
        )
    if edge.language.active >= edge.settings.max_sequences:
        raise try_again(
            f"{edge.language.active} answers are under way, which is as many as this server takes at once.",
            "overloaded",
            edge.settings.retry_after_s,
        )
    return edge.language


def _model(edge: Edge, name: str | None) -> LanguageModelInfo:
    models = edge.catalogue.language_models
    if not models:
        raise try_again("No language model is ready yet.", "not_ready", edge.settings.retry_after_s)
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(
            404,
            f"There is no language model {name[:80]!r}; there is {', '.join(models)}. Without 'model' it is that one.",
            code="model_not_found",
            param="model",
        )
    return models[name]


async def _prompts(desk: LanguageDesk, ask: CreateCompletion) -> list[bytes]:
    prompts = read_prompts(ask.prompt)
    if len(prompts) > MAX_SEQUENCES:
        raise invalid("prompt", f"'prompt' holds {len(prompts)} prompts; at most {MAX_SEQUENCES} go together.")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            packed = await desk.encode(prompt)
        elif any(not 0 <= token < desk.tokenizer.size for token in prompt):
            raise invalid("prompt", f"'prompt' holds a token id that is not from 0 to {desk.tokenizer.size - 1}.")
        else:
            packed = pack_tokens(prompt)
        if not packed:
            raise invalid("prompt", "'prompt' is empty, and this model needs at least one token to begin with.")
        found.append(packed)
    return found


async def _answer(
    request: web.Request, edge: Edge, desk: LanguageDesk, answer_id: str, asked: Asked, form: Form
) -> web.StreamResponse:
    tally = Tally(asked.prompts, len(asked.sequences))
    async with contextlib.aclosing(desk.speak(answer_id, asked)) as pieces:
        if asked.stream:
            return await _stream(request, edge, asked, form, tally, pieces)
        try:
            async for index, piece in pieces:
                tally.add(index, piece)
        except GenerationFailed as failed:
            raise _refusal(failed, edge.settings.retry_after_s) from failed
    return json_response(form.whole(tally.whole, tally.usage))


async def _stream(
    request: web.Request,
    edge: Edge,
    asked: Asked,
    form: Form,
    tally: Tally,
    pieces: AsyncIterator[tuple[int, Piece]],
) -> web.StreamResponse:
    """The head is sent with the first token, so that what fails before has its proper status."""
    stream = _Events(request, edge.settings.write_deadline_s)
    try:
        async for index, piece in pieces:
            tally.count(piece)
            # One event a step, also where its text waits for later tokens: a client may measure by them.
            await stream.send(answers.event_json(form.event(index, piece), asked.include_usage))
    except GenerationFailed as failed:
        refusal = _refusal(failed, edge.settings.retry_after_s)
        if not stream.begun:
            raise refusal from failed
        await stream.send(refusal.body.model_dump_json())
    else:
        if asked.include_usage:
            await stream.send(answers.event_json(form.usage_event(tally.usage), True))
    await stream.send("[DONE]")
    return stream.response


class _Events:
    """Writes server-sent events, each within a deadline: a client that does not read is let go."""

    def __init__(self, request: web.Request, deadline_s: float) -> None:
        self._request = request
        self._deadline_s = deadline_s
        self.response = web.StreamResponse(headers=_HEADERS)
        self.begun = False

    async def send(self, data: str) -> None:
        async with asyncio.timeout(self._deadline_s):
            if not self.begun:
                self.begun = True
                await self.response.prepare(self._request)
            await self.response.write(f"data: {data}\n\n".encode())


def _refusal(failed: GenerationFailed, retry_after_s: int) -> ApiError:
    if failed.retryable:
        return try_again(f"The answer could not be generated: {failed}.", failed.code, retry_after_s)
    if failed.code == "context_length_exceeded":
        return invalid(None, str(failed), failed.code)
    return internal()
