"""Answers language requests: makes token ids of text, has them continued, and makes text of what comes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from common.bus.port import Bus
from common.messages.chat import GenerateTokens, Sampling, pack_tokens, tokens_in
from gateway.chat.asked import Asked
from gateway.chat.generation import Generation, Patience
from gateway.chat.line import Step
from gateway.chat.metrics import LanguageMetrics
from gateway.chat.switchboard import Switchboard
from gateway.chat.text import AnswerText, Piece
from gateway.chat.tokenizer import LanguageTokenizer
from gateway.work import OwnedWork

R = TypeVar("R")

# Shorter texts are tokenized faster than a thread is woken for it.
_SHORT_CHARACTERS = 2048
# Pieces that may wait for one client; beyond it, they wait as tokens, of which there are at most max_tokens.
_PENDING = 64


class LanguageDesk:
    """One model's tokenizer and the way to its instances. ``active`` counts the sequences under way."""

    def __init__(
        self,
        bus: Bus,
        board: Switchboard,
        work: OwnedWork,
        tokenizer: LanguageTokenizer,
        patience: Patience,
        metrics: LanguageMetrics,
    ) -> None:
        self._bus = bus
        self._board = board
        self._work = work
        self._patience = patience
        self._metrics = metrics
        self.tokenizer = tokenizer
        self.active = 0

    async def encode(self, text: str) -> bytes:
        """See ``LanguageTokenizer.encode``; packed, as tokens stay from here on. Never holds the event loop up long."""
        return await _beside(len(text), lambda: pack_tokens(self.tokenizer.encode(text)))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> bytes:
        """See ``LanguageTokenizer.encode_chat``; packed."""
        characters = sum(len(message["content"]) for message in messages)
        return await _beside(characters, lambda: pack_tokens(self.tokenizer.encode_chat(messages, arguments)))

    async def speak(self, answer_id: str, asked: Asked) -> AsyncGenerator[tuple[int, Piece], None]:
        """The answers' pieces as they come, each with its answer's index. Left early, everything is cancelled.

        Raises:
            GenerationFailed: one of the answers cannot be brought to its end.
        """
        arrived_s = time.monotonic()
        pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_PENDING)
        tasks = [
            asyncio.create_task(
                self._answer(f"{answer_id}-{index}", index, prompt, sampling, asked, pieces, arrived_s),
                name=f"{answer_id}-{index}",
            )
            for index, (prompt, sampling) in enumerate(asked.sequences)
        ]
        left = len(tasks)
        try:
            while left:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(
        self,
        request_id: str,
        index: int,
        prompt: bytes,
        sampling: Sampling,
        asked: Asked,
        pieces: asyncio.Queue[tuple[int, Piece | Exception]],
        arrived_s: float,
    ) -> None:
        text = AnswerText(self.tokenizer.pieces, asked.stops)
        first = True

        async def deliver(step: Step) -> bool:
            nonlocal first
            piece = text.feed(step)
            self._metrics.generated(piece.tokens, piece.cached_tokens)
            if first and step.tokens:
                first = False
                self._metrics.first_token(time.monotonic() - arrived_s)
            if piece.finish is not None:
                counted.finish(piece.finish)
            await pieces.put((index, piece))
            return piece.finish is None

        request = GenerateTokens(
            request_id=request_id,
            epoch=0,
            tokens=b"",
            sampling=sampling,
            gateway=self._board.instance,
            decode="",
            created_at_s=time.time(),
        )
        generation = Generation(
            self._bus, self._board, self._work, self._patience, request, prompt, asked.conversation, self._metrics
        )
        with self._counted(tokens_in(prompt)) as counted:
            try:
                await generation.run(deliver)
            except Exception as error:  # noqa: BLE001 - raised again where the pieces are read
                counted.finish("failed")
                await pieces.put((index, error))

    @contextlib.contextmanager
    def _counted(self, prompt_tokens: int) -> Iterator["_Outcome"]:
        outcome = _Outcome()
        self.active += 1
        self._metrics.begun(prompt_tokens)
        try:
            yield outcome
        finally:
            self.active -= 1
            self._metrics.ended(outcome.name)


class _Outcome:
    """How a sequence ended; cancelled, unless it is said otherwise."""

    def __init__(self) -> None:
        self.name = "cancelled"

    def finish(self, name: str) -> None:
        self.name = name


async def _beside(characters: int, work: Callable[[], R]) -> R:
    """Do ``work`` here where it is short, and in a thread where it is long."""
    return work() if characters <= _SHORT_CHARACTERS else await asyncio.to_thread(work)
