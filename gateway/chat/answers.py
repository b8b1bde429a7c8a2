"""Puts answers into OpenAI's forms, whole or event by event. Pure."""

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from common.messages.chat import FinishReason, tokens_in
from gateway.chat.pieces import TokenPieces
from gateway.chat.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Finish,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from gateway.chat.text import Piece, TokenReport

# JSON has no infinity; OpenAI says this for what is impossible.
_LEAST_LOGPROB = -9999.0


class Form(Protocol):
    """How one kind of request is answered."""

    def event(self, index: int, piece: Piece) -> BaseModel:
        """One event of a stream."""

    def usage_event(self, usage: Usage) -> BaseModel:
        """The event that tells the usage."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        """The whole answer, of one piece for each choice."""


class Tally:
    """Counts what a request has used, and puts its pieces together."""

    def __init__(self, prompts: Sequence[bytes], answers: int) -> None:
        self._prompt_tokens = sum(map(tokens_in, prompts))
        self._pieces: list[list[Piece]] = [[] for _ in range(answers)]
        self._tokens = 0
        self._cached_tokens = 0

    def add(self, index: int, piece: Piece) -> None:
        self._tokens += piece.tokens
        self._cached_tokens += piece.cached_tokens
        self._pieces[index].append(piece)

    def count(self, piece: Piece) -> None:
        """Add to the usage only: the text has been told already."""
        self._tokens += piece.tokens
        self._cached_tokens += piece.cached_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            total_tokens=self._prompt_tokens + self._tokens,
            # A prompt with several answers, or an answer begun anew, can find more than its own length.
            prompt_tokens_details=PromptTokensDetails(cached_tokens=min(self._cached_tokens, self._prompt_tokens)),
        )

    @property
    def whole(self) -> list[Piece]:
        """Each answer as one piece."""
        return [
            Piece(
                "".join(piece.text for piece in pieces),
                sum(piece.tokens for piece in pieces),
                tuple(report for piece in pieces for report in piece.reports),
                pieces[-1].finish,
            )
            for pieces in self._pieces
        ]


class ChatForm:
    """Chat completions."""

    def __init__(self, answer_id: str, created_s: int, model: str, pieces: TokenPieces, logprobs: bool) -> None:
        self._id = answer_id
        self._created = created_s
        self._model = model
        self._pieces = pieces
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def event(self, index: int, piece: Piece) -> ChatCompletionChunk:
        """The first event of each answer says whose it is."""
        delta = ChatDelta(content=piece.text) if piece.text or piece.finish is None else ChatDelta()
        if index not in self._begun:
            self._begun.add(index)
            delta = ChatDelta(role="assistant", content=piece.text)
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=self._told(piece), finish_reason=_finish(piece.finish)
        )
        return self._chunk([choice])

    def usage_event(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([]).model_copy(update={"usage": usage})

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=piece.text),
                logprobs=self._told(piece),
                finish_reason=_finish(piece.finish) or "stop",
            )
            for index, piece in enumerate(pieces)
        ]
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=choices)

    def _told(self, piece: Piece) -> ChatLogprobs | None:
        return ChatLogprobs(content=[self._token(report) for report in piece.reports]) if self._logprobs else None

    def _token(self, report: TokenReport) -> ChatLogprob:
        top = [self._top(token, logprob) for token, logprob in report.logprobs.alternatives]
        chosen = self._top(report.token, report.logprobs.logprob)
        return ChatLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        name = self._pieces.name(token)
        return TopLogprob(token=name.decode("utf-8", "replace"), logprob=_finite(logprob), bytes=list(name))


class CompletionForm:
    """Completions."""

    def __init__(self, answer_id: str, created_s: int, model: str, pieces: TokenPieces, logprobs: bool) -> None:
        self._id = answer_id
        self._created = created_s
        self._model = model
        self._pieces = pieces
        self._logprobs = logprobs

    def event(self, index: int, piece: Piece) -> Completion:
        return self._completion([self._choice(index, piece)])

    def usage_event(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Completion:
        return self._completion([self._choice(index, piece) for index, piece in enumerate(pieces)], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, piece: Piece) -> CompletionChoice:
        told = self._told(piece.reports) if self._logprobs else None
        return CompletionChoice(index=index, text=piece.text, logprobs=told, finish_reason=_finish(piece.finish))

    def _told(self, reports: Sequence[TokenReport]) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[report.offset for report in reports],
            token_logprobs=[_finite(report.logprobs.logprob) for report in reports],
            tokens=[self._name(report.token) for report in reports],
            top_logprobs=[self._likeliest(report) for report in reports],
        )

    def _likeliest(self, report: TokenReport) -> dict[str, float]:
        """The likeliest tokens and the chosen one. Of tokens that read the same, the likelier is told."""
        told: dict[str, float] = {}
        for token, logprob in (*report.logprobs.alternatives, (report.token, report.logprobs.logprob)):
            told.setdefault(self._name(token), _finite(logprob))
        return told

    def _name(self, token: int) -> str:
        return self._pieces.name(token).decode("utf-8", "replace")


def event_json(event: BaseModel, with_usage: bool) -> str:
    """An event as OpenAI's readers expect it: a delta holds what is new, usage is there where it was asked for."""
    exclude: dict[str, Any] = {} if with_usage else {"usage": True}
    if isinstance(event, ChatCompletionChunk):
        exclude["choices"] = {
            place: {"delta": set(ChatDelta.model_fields) - choice.delta.model_fields_set}
            for place, choice in enumerate(event.choices)
        }
    return event.model_dump_json(exclude=exclude)


def _finish(finish: FinishReason | None) -> Finish | None:
    match finish:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case None:
            return None


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
