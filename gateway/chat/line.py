"""One attempt at a sequence as its gateway hears it: every token once and in order, or the news that it is broken."""

import asyncio
from dataclasses import dataclass, field

from common.messages.chat import ChatRoute, FinishReason, SequenceTokens, TokenLogprobs
from common.messages.failures import Failure, Stage
from gateway.chat.holders import Holders


@dataclass
class Step:
    """Tokens that have come since the last look: ``logprobs`` for each of them, or none."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0


class Broken(Exception):
    """The attempt brings nothing more; another may. ``avoid``: where not to go again, ``gone``: where nobody is."""

    def __init__(
        self,
        why: str,
        message: str,
        *,
        retryable: bool = True,
        avoid: tuple[str, ...] = (),
        gone: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.why = why
        self.retryable = retryable
        self.avoid = avoid
        self.gone = gone


class Line:
    """Hears one epoch of one sequence. What waits here is bounded by the sequence's ``max_tokens``."""

    def __init__(self, route: ChatRoute, expected: int, max_tokens: int) -> None:
        """expected: the position of the next token."""
        self.route = route
        self.expected = expected
        self._max_tokens = max_tokens
        self._waiting = Step()
        self._broken: Broken | None = None
        self._news = asyncio.Event()
        self._holders = Holders(route.prefill, route.decode)

    @property
    def instances(self) -> tuple[str, ...]:
        """Who may have the sequence now, each before the one that it hands over to."""
        return self._holders.names

    @property
    def decode(self) -> str:
        """Who goes on after the first token, as far as is known; empty: nobody has said."""
        return self._holders.decode

    @property
    def decoding(self) -> bool:
        """Whether tokens come from another instance than the one that computed the first."""
        return self._holders.decoding

    def hear(self, instance: str, news: SequenceTokens) -> None:
        """Take in what a step brought. What is known already is left out, what was missed breaks the line."""
        if self._waiting.finish is not None or self._broken is not None:
            return
        known = self.expected - news.offset
        if known < 0:
            message = f"tokens {self.expected} to {news.offset - 1} from {instance} never came"
            self.break_off(Broken("gap", message))
            return
        if known < len(news.tokens):
            self._holders.spoke(instance)
        if news.decode and known <= len(news.tokens):
            self._holders.hands_over(instance, news.decode)
        self._waiting.tokens += news.tokens[known:]
        self._waiting.logprobs += news.logprobs[known:]
        self._waiting.cached_tokens += news.cached_tokens
        self.expected = max(self.expected, news.offset + len(news.tokens))
        if news.finish is not None:
            self._waiting.finish = news.finish
        elif self.expected >= self._max_tokens:
            self._waiting.finish = FinishReason.LENGTH
        elif news.failure is not None:
            self.break_off(self._failed(instance, news.failure))
        self._news.set()

    def _failed(self, instance: str, failure: Failure) -> Broken:
        # The prefill instance speaks for a decode instance that would not or could not take the sequence over.
        culprit = self._holders.after(instance) if failure.stage is Stage.DECODE else instance
        gone = (culprit,) if failure.code == "nobody_there" else ()
        return Broken(failure.code, failure.message, retryable=failure.retryable, avoid=(culprit,), gone=gone)

    def moved(self, instance: str, to: str) -> None:
        """An instance says, when asked, that it has handed the sequence over."""
        self._holders.hands_over(instance, to)

    def lose(self, instance: str) -> None:
        """An instance is gone; that breaks the line if it may have had the sequence."""
        if instance in self.instances:
            self.break_off(Broken("lost", f"{instance} is lost", avoid=(instance,)))

    def break_off(self, broken: Broken) -> None:
        """End the line, once what has come is taken."""
        if self._waiting.finish is None and self._broken is None:
            self._broken = broken
            self._news.set()

    async def stir(self) -> None:
        """Wait for tokens, or for the line's end; ``next`` has them then."""
        await self._news.wait()

    async def next(self, silence_s: float) -> Step | None:
        """What has come, all at once; None after ``silence_s`` seconds of nothing.

        Raises:
            Broken: nothing more comes.
        """
        if not self._news.is_set():
            try:
                async with asyncio.timeout(silence_s):
                    await self._news.wait()
            except TimeoutError:
                return None
        self._news.clear()
        if self._broken is not None:
            # Heard again after what has come before it.
            self._news.set()
            if not self._waiting.tokens:
                raise self._broken
        step, self._waiting = self._waiting, Step()
        return step
