"""The sequences that an instance has, each under its newest epoch."""

import asyncio
from dataclasses import dataclass

from common.engine import Finish, Output, Request
from common.mempool.address import TOKEN_BYTES
from common.messages.chat import (
    ExpectedAnswer,
    FinishReason,
    GenerateTokens,
    SequenceTokens,
    TokenLogprobs,
    pack_tokens,
    tokens_in,
)
from common.messages.failures import Failure
from common.models.causal_lm.sampling import SamplingParameters
from common.policies.fence import Fence, StaleEpoch
from common.policies.language.length_prediction import LengthRange

_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}


@dataclass(slots=True)
class Held:
    """One attempt at a sequence, its tokens packed.

    ``answered`` is what of the answer there is, over all attempts; ``prefill`` who handed it over, if anybody did;
    ``known`` the answer of who will decode it, of how many tokens it has keys and values; ``expected`` what is
    predicted of the answer's length, where anything is, and ``told`` what who handed it over said of that; ``heavy``
    whether that is much, of one that is decoded here; ``unsaid`` who goes on with it, as long as the gateway has not
    been told.
    """

    request: GenerateTokens
    prompt: bytes
    answered: bytearray
    prefill: str = ""
    known: asyncio.Future[int] | None = None
    expected: asyncio.Future[LengthRange] | None = None
    told: ExpectedAnswer | None = None
    heavy: bool = False
    unsaid: str = ""

    async def known_there(self) -> int:
        """Of how many of its tokens who decodes it has keys and values already."""
        return 0 if self.known is None else await asyncio.shield(self.known)

    @classmethod
    def of(cls, request: GenerateTokens) -> "Held":
        """Raises: ValueError: its tokens are none, or fewer than it says to be generated."""
        count = tokens_in(request.tokens)
        if count <= request.generated or len(request.tokens) % TOKEN_BYTES:
            raise ValueError(f"{count} tokens, {request.generated} of them generated, are no prompt")
        end = TOKEN_BYTES * (count - request.generated)
        return cls(request, request.tokens[:end], bytearray(request.tokens[end:]))

    @property
    def key(self) -> str:
        """Its name in the engine."""
        return f"{self.request.request_id}/{self.request.epoch}"

    @property
    def generated(self) -> int:
        return len(self.answered) // TOKEN_BYTES

    @property
    def tokens(self) -> bytes:
        """The prompt, and what of the answer there is."""
        return self.prompt + bytes(self.answered)

    @property
    def kv_tokens(self) -> int:
        """Of so many tokens there are keys and values once the next token is to be computed: of all but the last."""
        return tokens_in(self.prompt) + self.generated - 1

    def asked(self, park: bool) -> Request:
        """What the engine is asked for. Raises: ValueError: a value is out of its range."""
        sampling = self.request.sampling
        return Request(
            prompt=self.prompt,
            most_tokens=sampling.max_tokens,
            sampling=SamplingParameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                seed=sampling.seed,
                logprobs=sampling.logprobs,
            ),
            ignore_end=sampling.ignore_end,
            stop_tokens=frozenset(sampling.stop_token_ids),
            answered=bytes(self.answered),
            park=park,
        )

    def take(self, output: Output) -> SequenceTokens:
        """Note a token, and say so."""
        sampled = output.sampled
        told: tuple[TokenLogprobs, ...] = ()
        if sampled.logprob is not None:
            told = (TokenLogprobs(logprob=sampled.logprob, alternatives=sampled.top),)
        news = SequenceTokens(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            offset=self.generated,
            tokens=(sampled.token,),
            logprobs=told,
            finish=None if output.finish is None else _REASONS[output.finish],
            cached_tokens=output.cached_tokens,
            decode=self._said(),
        )
        self.answered += pack_tokens((sampled.token,))
        return news

    def goes_to(self, instance: str) -> None:
        """Have another instance go on with it, which its next tokens will say, or ``hand_to``."""
        self.request = self.request.model_copy(update={"decode": instance})
        self.unsaid = instance

    def hand_to(self, instance: str) -> SequenceTokens:
        """Have another instance go on with it, and say so."""
        self.goes_to(instance)
        return SequenceTokens(
            request_id=self.request.request_id, epoch=self.request.epoch, offset=self.generated, decode=self._said()
        )

    def _said(self) -> str:
        said, self.unsaid = self.unsaid, ""
        return said

    def failed(self, failure: Failure) -> SequenceTokens:
        return SequenceTokens(
            request_id=self.request.request_id, epoch=self.request.epoch, offset=self.generated, failure=failure
        )

    def so_far(self) -> GenerateTokens:
        """The request to go on from here."""
        return self.request.model_copy(update={"tokens": self.tokens, "generated": self.generated})


class Sequences:
    """At most ``most`` at once. ``idle`` is set while there are none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, Held] = {}
        self._fence = Fence()
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def all(self) -> list[Held]:
        return list(self._held.values())

    @property
    def full(self) -> bool:
        return len(self._held) >= self._most

    def admit(self, held: Held) -> Held | None:
        """Take it in; the attempt whose place it takes, which is to be dropped.

        Raises:
            StaleEpoch: it was cancelled before it came, or a newer attempt is here.
        """
        request_id, epoch = held.request.request_id, held.request.epoch
        former = self._held.get(request_id)
        if self._fence.void(request_id, epoch) or (former is not None and former.request.epoch >= epoch):
            raise StaleEpoch(f"epoch {epoch} of {request_id} is cancelled, or not the newest")
        self._held[request_id] = held
        self.idle.clear()
        return former

    def void(self, request_id: str, epoch: int) -> bool:
        """Whether the epoch was cancelled, come it before or after."""
        return self._fence.void(request_id, epoch)

    def has(self, held: Held) -> bool:
        """Whether it is still wanted."""
        return self._held.get(held.request.request_id) is held

    def holds(self, request_id: str) -> bool:
        """Whether any attempt at it is here."""
        return request_id in self._held

    def find(self, request_id: str, epoch: int) -> Held | None:
        held = self._held.get(request_id)
        return held if held is not None and held.request.epoch == epoch else None

    def named(self, key: str) -> Held | None:
        """By its name in the engine."""
        request_id, _, epoch = key.rpartition("/")
        return self.find(request_id, int(epoch))

    def remove(self, held: Held) -> None:
        """It is at its end here; once more does nothing."""
        if self.has(held):
            del self._held[held.request.request_id]
            if not self._held:
                self.idle.set()

    def cancel(self, request_id: str, epoch: int) -> Held | None:
        """Void all epochs up to this one, come they before or after; the attempt that was here."""
        self._fence.revoke(request_id, epoch)
        held = self._held.get(request_id)
        if held is None or held.request.epoch > epoch:
            return None
        self.remove(held)
        return held
