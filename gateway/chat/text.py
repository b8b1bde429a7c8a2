"""One answer's text, as its tokens come."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.messages.chat import FinishReason, TokenLogprobs
from gateway.chat.line import Step
from gateway.chat.pieces import Detokenizer, TokenPieces
from gateway.chat.stops import StopStrings


@dataclass(frozen=True)
class TokenReport:
    """A token of the answer, its log-probabilities, and where in the text it begins (in characters)."""

    token: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Piece:
    """What can be shown now, and how many ``tokens`` it took. After a ``finish`` nothing comes."""

    text: str
    tokens: int
    reports: tuple[TokenReport, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0


class AnswerText:
    """Makes text of tokens, and finds its end. A token's text may show only with later ones."""

    def __init__(self, pieces: TokenPieces, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(pieces)
        self._stops = StopStrings(stops)
        self._characters = 0

    def feed(self, step: Step) -> Piece:
        """Take in a step. Tokens after a stop string do not count: they are as if never generated."""
        shown: list[str] = []
        reports = []
        # The token that ended the answer is not part of its text.
        silent = len(step.tokens) - 1 if step.finish is FinishReason.STOP else len(step.tokens)
        for place, token in enumerate(step.tokens):
            if step.logprobs:
                reports.append(TokenReport(token, step.logprobs[place], self._characters))
            if place < silent:
                shown.append(self._show(self._detokenizer.feed((token,))))
            if self._stops.found:
                return Piece("".join(shown), place + 1, tuple(reports), FinishReason.STOP, step.cached_tokens)
        if step.finish is not None:
            shown += (self._show(self._detokenizer.flush()), self._stops.flush())
        finish = FinishReason.STOP if self._stops.found else step.finish
        return Piece("".join(shown), len(step.tokens), tuple(reports), finish, step.cached_tokens)

    def _show(self, text: str) -> str:
        self._characters += len(text)
        return self._stops.feed(text)
