"""The sequences that an instance has, each under its newest epoch."""

import asyncio
from dataclasses import dataclass

from common.engine import Finish, Output, Request
from common.messages.chat import FinishReason, GenerateTokens, SequenceTokens, TokenLogprobs, pack_tokens, unpack_tokens
from common.messages.failures import Failure
from common.models.causal_lm.sampling import SamplingParameters
from common.policies.fence import Fence, StaleEpoch

_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}


@dataclass(slots=True)
class Held:
    """One attempt at a sequence. ``answered`` is what of the answer there is, over all attempts."""

    request: GenerateTokens
    prompt: tuple[int, ...]
    answered: list[int]

    @classmethod
    def of(cls, request: GenerateTokens) -> "Held":
        """Raises: ValueError: its tokens are none, or fewer than it says to be generated."""
        tokens = unpack_tokens(request.tokens)
        prompt = len(tokens) - request.generated
        if prompt < 1:
            raise ValueError(f"{len(tokens)} tokens, {request.generated} of them generated, are no prompt")
        return cls(request, tuple(tokens[:prompt]), tokens[prompt:])

    @property
    def key(self) -> str:
        """Its name in the engine."""
        return f"{self.request.request_id}/{self.request.epoch}"

    @property
    def generated(self) -> int:
        return len(self.answered)

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
            answered=tuple(self.answered),
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
        )
        self.answered.append(sampled.token)
        return news

    def failed(self, failure: Failure) -> SequenceTokens:
        return SequenceTokens(
            request_id=self.request.request_id, epoch=self.request.epoch, offset=self.generated, failure=failure
        )

    def so_far(self) -> GenerateTokens:
        """The request to go on from here."""
        tokens = pack_tokens((*self.prompt, *self.answered))
        return self.request.model_copy(update={"tokens": tokens, "generated": self.generated})


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
