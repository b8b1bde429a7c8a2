"""Request and reply: one message there, one back, and every failure typed."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription

from common.bus.address import address
from common.bus.errors import BadReply, BusError, DeadlineExceeded, Refusal, RemoteFailure
from common.bus.link import Link
from common.bus.port import EventHandler, RequestHandler
from common.messages.base import Message, MessageError, kind_of
from common.messages.failures import Failure, Stage
from common.messages.subjects import Body, EventSubject, Reply, Request, RequestSubject

# Requests that may wait for their turn on one subject; the next ones get no answer.
MAX_WAITING = 4096


async def request(
    link: Link, subject: RequestSubject[Request, Reply], body: Request, tokens: tuple[str, ...], deadline_s: float
) -> Reply:
    """Ask and wait; see ``Bus.request``."""
    message = await link.request(address(subject.pattern, tokens), body.pack(), deadline_s)
    try:
        return subject.reply.unpack(message.data)
    except MessageError as error:
        raise _failed(message.data, error) from None


def _failed(data: bytes, error: MessageError) -> BusError:
    try:
        if kind_of(data) == Failure.__name__:
            return RemoteFailure(Failure.unpack(data))
    except MessageError as worse:
        error = worse
    return BadReply(str(error))


class Handling:
    """A subscription with its running handlers; both kinds below end in the same way."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subscription: ClientSubscription | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._forget: Callable[[], None] | None = None

    async def heard(self, message: Msg) -> None:
        """Called with every message, one after another."""
        raise NotImplementedError

    async def start(self, subject: str, queue: str, max_pending: int, forget: Callable[[], None]) -> None:
        """Begin to hear; ``forget`` is called once it has stopped."""
        self._forget = forget
        self._subscription = await self._link.subscribe(subject, self.heard, queue=queue, max_pending=max_pending)

    async def stop(self, deadline_s: float | None = None) -> None:
        """See ``Subscription.stop``."""
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        clock = asyncio.get_running_loop().time
        end_s = clock() + (self._link.deadline_s if deadline_s is None else deadline_s)
        draining = self._link.spawn(self._link.drain(subscription), "draining a subscription")
        await asyncio.wait({draining}, timeout=end_s - clock())
        if not draining.done():
            await self._link.drop(subscription)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=max(0.0, end_s - clock()))
        await self._cancel_handlers()

    async def cancel(self) -> None:
        """Stop at once, running handlers included."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._link.drop(subscription)
        await self._cancel_handlers()

    async def _cancel_handlers(self) -> None:
        late = set(self._tasks)
        for task in late:
            task.cancel()
        if late:
            await asyncio.gather(*late, return_exceptions=True)
        if self._forget is not None:
            self._forget()


class Serving(Handling):
    """Answers one subject; at most ``max_in_flight`` handlers run at a time."""

    def __init__(
        self,
        link: Link,
        stage: Stage,
        subject: RequestSubject[Any, Any],
        handler: RequestHandler[Any, Any],
        max_in_flight: int,
    ) -> None:
        super().__init__(link)
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be 1 or more, got {max_in_flight}")
        self._stage = stage
        self._subject = subject
        self._handler = handler
        self._free = asyncio.Semaphore(max_in_flight)

    async def heard(self, message: Msg) -> None:
        """Start a handler as soon as one may run; until then the messages wait in the subscription's queue."""
        await self._free.acquire()
        task = asyncio.create_task(self._handle(message), name=self._subject.pattern)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free.release()

    async def _handle(self, message: Msg) -> None:
        answer = await self._answer(message.data)
        if not message.reply:
            return
        try:
            await self._link.publish(message.reply, answer)
        except BusError as error:
            self._link.log.warning("reply not sent", subject=message.subject, reason=str(error))

    async def _answer(self, data: bytes) -> bytes:
        try:
            request = self._subject.request.unpack(data)
        except MessageError as error:
            return self._failure("bad_message", str(error))
        try:
            reply: Message = await self._handler(request)
            return reply.pack()
        except Refusal as refusal:
            return refusal.failure.pack()
        except Exception as error:  # noqa: BLE001 - whatever the handler raises, the one who asked gets an answer
            self._link.log.failure("handler failed", error, subject=self._subject.pattern)
            return self._failure("internal", f"{type(error).__name__}: {error}")

    def _failure(self, code: str, text: str) -> bytes:
        return Failure(stage=self._stage, code=code, message=text).pack()


class Listening(Handling):
    """Hears one subject; one handler at a time, in order."""

    def __init__(self, link: Link, subject: EventSubject[Body], handler: EventHandler[Body]) -> None:
        super().__init__(link)
        self._body = subject.body
        self._handler = handler
        self._begun = 0
        self._done = 0
        # Set once so many are done with.
        self._awaited: dict[asyncio.Event, int] = {}

    async def heard(self, message: Msg) -> None:
        self._begun += 1
        try:
            await self._handle(message)
        finally:
            self._done += 1
            for reached, count in self._awaited.items():
                if count <= self._done:
                    reached.set()

    async def caught_up(self, deadline_s: float | None = None) -> None:
        """See ``Hearing.caught_up``."""
        waiting = 0 if self._subscription is None else self._subscription.pending_msgs
        count = self._begun + waiting
        if count == self._done:
            return
        reached = asyncio.Event()
        self._awaited[reached] = count
        try:
            async with asyncio.timeout(self._link.deadline_s if deadline_s is None else deadline_s):
                await reached.wait()
        except TimeoutError:
            left = count - self._done
            raise DeadlineExceeded(f"{left} events that had come are not heard yet") from None
        finally:
            del self._awaited[reached]

    async def _handle(self, message: Msg) -> None:
        try:
            body = self._body.unpack(message.data)
        except MessageError as error:
            self._link.log.warning("unreadable event left out", subject=message.subject, reason=str(error))
            return
        try:
            outcome = self._handler(body)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception as error:  # noqa: BLE001 - one event must not cost the next
            self._link.log.failure("event handler failed", error, subject=message.subject)
