"""What is asked of an engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from common.messages.chat import tokens_in
from common.models.causal_lm.sampling import Sampled, SamplingParameters


class Finish(StrEnum):
    """Why an answer ended, in the words of OpenAI's interface."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to one prompt.

    Attributes:
        prompt: token ids, at least one, packed (``common.messages.chat.pack_tokens``).
        most_tokens: the answer's length at most, at least 1.
        stops: strings that end the answer and are not part of it.
        ignore_end: go on after a token that ends answers.
        stop_tokens: ids that end the answer beside the model's own.
        answered: what of the answer there is already, packed; it counts in ``most_tokens`` and in penalties.
        park: compute one token only, and keep the blocks for somebody who goes on from there (``Engine.parked``).
    """

    prompt: bytes
    most_tokens: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stops: tuple[str, ...] = ()
    ignore_end: bool = False
    stop_tokens: frozenset[int] = frozenset()
    answered: bytes = b""
    park: bool = False

    def __post_init__(self) -> None:
        if not self.prompt or self.most_tokens <= tokens_in(self.answered):
            raise ValueError("a request needs a prompt and room for one token")

    @property
    def computed_tokens(self) -> int:
        """Of how many tokens keys and values are computed in the end. The last token's never are."""
        return tokens_in(self.prompt) + (tokens_in(self.answered) if self.park else self.most_tokens - 1)


@dataclass(frozen=True, slots=True)
class Output:
    """One more token of an answer.

    Attributes:
        sequence: whose.
        sampled: the token; one that ends the answer is told, but has no text.
        text: what may be shown by now, given that characters and stop strings may be incomplete.
        finish: why this is the last, None if it is not.
        cached_tokens: how many of the sequence's tokens were not computed, as their keys and values were there; the
            first token says it.
    """

    sequence: str
    sampled: Sampled
    text: str
    finish: Finish | None
    cached_tokens: int = 0


def alternatives(request: Request, count: int) -> Sequence[Request]:
    """The request `count` times (OpenAI's ``n``), each with random numbers of its own."""
    return [
        replace(request, sampling=replace(request.sampling, seed=request.sampling.seed + number))
        for number in range(count)
    ]
