"""Brings the workers' messages to the sequences they are about, and tells workers of sequences that nobody wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus, Hearing
from common.messages.chat import CancelGeneration, ChatRoute, ChatsUnderWay, TokensGenerated
from common.messages.subjects import CANCEL_GENERATION, CHATS_UNDER_WAY, TOKENS_GENERATED
from gateway.chat.line import Line
from gateway.chat.metrics import LanguageMetrics

log = structlog.get_logger()

# Steps of all instances that may wait for this process; what is beyond is dropped, and missed by its offset.
_MAX_PENDING = 65536
# How often the scheduler is told what is under way, lest it counts for ever what it did not hear the end of.
_TELL_S = 5.0


class Switchboard:
    """``instance`` is the gateway's own, at which workers' tokens arrive."""

    def __init__(self, bus: Bus, instance: str, metrics: LanguageMetrics) -> None:
        self._bus = bus
        self.instance = instance
        self._metrics = metrics
        self._lines: dict[str, Line] = {}
        self._hearing: Hearing | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hear workers, and tell the scheduler what is under way, while the block runs."""
        hearing = await self._bus.subscribe(TOKENS_GENERATED, self._heard, self.instance, max_pending=_MAX_PENDING)
        self._hearing = hearing
        telling = asyncio.create_task(self._tell_always(), name="tell what is under way")
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await hearing.stop(deadline_s=0.0)

    @contextlib.contextmanager
    def line(self, request_id: str, route: ChatRoute, expected: int, max_tokens: int) -> Iterator[Line]:
        """The line of one attempt, heard while the block runs; it takes the place of any before."""
        line = self._lines[request_id] = Line(route, expected, max_tokens)
        try:
            yield line
        finally:
            if self._lines.get(request_id) is line:
                del self._lines[request_id]

    async def caught_up(self, deadline_s: float) -> None:
        """Return once every line has what was sent to it before the last answer to a question.

        Raises:
            DeadlineExceeded: not all of that is heard yet.
        """
        if self._hearing is not None:
            await self._hearing.caught_up(deadline_s)

    def lose(self, instance: str) -> None:
        """A member is gone, with every sequence it had."""
        self._metrics.lost(instance)
        for line in self._lines.values():
            line.lose(instance)

    async def cancel(self, request_id: str, epoch: int, instances: Iterable[str]) -> None:
        """Have workers drop a sequence. Should one not hear it, its next tokens are answered in the same way."""
        for instance in instances:
            await self._bus.publish(CANCEL_GENERATION, CancelGeneration(request_id=request_id, epoch=epoch), instance)

    async def _tell_always(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            try:
                epochs = tuple(line.route.epoch for line in self._lines.values())
                await self._bus.publish(CHATS_UNDER_WAY, ChatsUnderWay(gateway=self.instance, epochs=epochs))
            except BusError as error:
                log.warning("not told what is under way", reason=str(error))
            except Exception:
                # Nobody knows why, but every stream of this gateway is worth more than this: the next may be told.
                log.exception("not told what is under way")

    async def _heard(self, news: TokensGenerated) -> None:
        self._metrics.spoke(news.instance, news.waiting, news.preemptions)
        for sequence in news.sequences:
            line = self._lines.get(sequence.request_id)
            if line is not None and line.route.epoch == sequence.epoch:
                line.hear(news.instance, sequence)
            elif sequence.finish is None and sequence.failure is None:
                await self.cancel(sequence.request_id, sequence.epoch, (news.instance,))
