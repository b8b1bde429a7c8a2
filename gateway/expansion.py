"""Has the language model make a caption of a terse idea, before the video's job is stored.

The idea goes the way of a chat with one message, answered greedily, so that the same idea gives the same caption. What
a good caption is, the model knows; here it is only judged whether there is one at all.
"""

import asyncio
import contextlib
from uuid import uuid4

import structlog

from common.messages.chat import FinishReason, Sampling, tokens_in
from common.messages.cluster import LanguageModelInfo, VideoModelInfo
from gateway.chat.asked import Asked
from gateway.chat.desk import LanguageDesk
from gateway.chat.generation import GenerationFailed
from gateway.chat.template import TemplateRefusal
from gateway.edge import Edge
from gateway.errors import ApiError, invalid, try_again
from gateway.validation import longest_prompt

log = structlog.get_logger()

MAX_TOKENS = 48
_FIELD = "expand_prompt"
_REMEDY = f"leave {_FIELD!r} out"


class _NoCaption(Exception):
    """The language model has answered, or cannot; the prompt stays as it was given."""


async def expand(edge: Edge, idea: str, model: VideoModelInfo) -> str | None:
    """The caption of ``idea`` on one line; None if the language model has none that ``model`` could read.

    Raises:
        ApiError: 400, there is no language model that answers messages; 503, it is away or overloaded for now.
    """
    desk, info = _language(edge)
    try:
        async with asyncio.timeout(edge.settings.expansion_s):
            caption = await _answer(desk, info, idea)
        if not caption or len(caption) > longest_prompt(model):
            raise _NoCaption(f"the answer has {len(caption)} characters")
        return caption
    except _NoCaption as reason:
        log.info("prompt kept as it was given", reason=str(reason))
        return None
    except TimeoutError as error:
        late = f"the language model did not answer within {edge.settings.expansion_s:g} s"
        raise _later(edge, late, "expansion_timeout") from error
    except GenerationFailed as failed:
        raise _later(edge, f"the language model could not answer ({failed})", failed.code) from failed


def _language(edge: Edge) -> tuple[LanguageDesk, LanguageModelInfo]:
    desk = edge.language
    if desk is None:
        raise invalid(
            _FIELD,
            f"{_FIELD!r} needs a language model and this server has none: start the stack with one, or {_REMEDY}.",
            "no_language_model",
        )
    models = edge.catalogue.language_models
    if not models:
        raise _later(edge, "no language model is ready yet", "not_ready")
    info = next(iter(models.values()))
    if desk.tokenizer.template is None:
        raise invalid(
            _FIELD, f"{info.name} has no chat template, so it cannot expand the prompt; {_REMEDY}.", "no_template"
        )
    if desk.active >= edge.settings.max_sequences:
        raise _later(edge, f"{desk.active} answers are under way, as many as are taken at once", "overloaded")
    return desk, info


async def _answer(desk: LanguageDesk, info: LanguageModelInfo, idea: str) -> str:
    """The whole answer, its white space made single spaces.

    Raises:
        _NoCaption: there is no whole answer and will be none.
        GenerationFailed: there may be one later.
    """
    try:
        prompt = await desk.encode_chat([{"role": "user", "content": idea}], {})
    except TemplateRefusal as refusal:
        raise _NoCaption(f"the chat template refuses it: {refusal}") from refusal
    room = info.context_tokens - tokens_in(prompt)
    if room < 1:
        raise _NoCaption(f"it fills the context of {info.context_tokens} tokens")
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=min(MAX_TOKENS, room))
    asked = Asked(info.name, (prompt,), 1, sampling, stops=(), stream=False, include_usage=False)
    parts, finish = [], None
    try:
        async with contextlib.aclosing(desk.speak(f"expand-{uuid4().hex}", asked)) as pieces:
            async for _, piece in pieces:
                parts.append(piece.text)
                finish = piece.finish
    except GenerationFailed as failed:
        if failed.retryable:
            raise
        raise _NoCaption(str(failed)) from failed
    if finish is not FinishReason.STOP:
        raise _NoCaption(f"the answer was cut off after {sampling.max_tokens} tokens")
    return " ".join("".join(parts).split())


def _later(edge: Edge, why: str, code: str) -> ApiError:
    message = f"The prompt could not be expanded and no video was ordered: {why}. Try again, or {_REMEDY}."
    return try_again(message, code, edge.settings.retry_after_s)
