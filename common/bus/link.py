"""The connection to the broker: it comes back by itself, says so in one line each way, and never waits for ever."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Self

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from common.bus.errors import BusUnavailable, DeadlineExceeded, NobodyThere
from common.bus.log import BusLog

_RETRY_S = 0.5
# A broker that answers no ping for so long is gone, even where the connection was never closed.
_PING_INTERVAL_S = 5
_UNANSWERED_PINGS = 3
_LOG_EVERY_ATTEMPTS = 20
# The client notices a lost connection a moment before it says so.
_UP_SOON_S = 0.01
# How late a message may come that was on its way when its subscription ended. A fraction of a millisecond is common,
# but a broker on a busy machine may stand still for a while. Who closes does not wait for so long.
_STRAGGLER_S = 10.0
_STRAGGLER_AT_CLOSING_S = 0.2
_NO_RESPONDERS = "503"


class _Expired(Exception):
    """The time for an answer is over."""


def _expire(answer: "asyncio.Future[Msg]") -> None:
    if not answer.done():
        answer.set_exception(_Expired())


class Link:
    """One connection of ``nats-py``, with an epoch that grows with every reconnect."""

    def __init__(self, url: str, log: BusLog, deadline_s: float) -> None:
        self.client = Client()
        self.log = log
        self.deadline_s = deadline_s
        self.epoch = 0
        self._url = url
        self._up = asyncio.Event()
        self._ever_connected = False
        self._failed_attempts = 0
        self._dropped = 0
        self._on_reconnect: set[Callable[[], None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._inbox = self.client.new_inbox() + "."
        self._request_numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Msg]] = {}

    @classmethod
    async def open(cls, url: str, name: str, log: BusLog, deadline_s: float, connect_deadline_s: float | None) -> Self:
        """Connect, trying again until it works or ``connect_deadline_s`` has passed.

        ``url``: one address, or several of a cluster, separated by commas.

        Raises:
            BusUnavailable: no connection by the deadline.
        """
        link = cls(url, log, deadline_s)
        options: dict[str, Any] = {
            "servers": url.split(","),
            "name": name,
            "error_cb": link._error,
            "disconnected_cb": link._lost,
            "reconnected_cb": link._back,
            "closed_cb": link._closed,
            "reconnect_time_wait": _RETRY_S,
            "max_reconnect_attempts": -1,
            "ping_interval": _PING_INTERVAL_S,
            "max_outstanding_pings": _UNANSWERED_PINGS,
        }
        try:
            async with asyncio.timeout(connect_deadline_s):
                await link.client.connect(**options)
        except TimeoutError as error:
            await link._close_client()
            raise BusUnavailable(f"no broker at {url} within {connect_deadline_s} s") from error
        except BaseException:
            await link._close_client()
            raise
        if link.client.is_connecting:
            # Where either side stood still meanwhile, the broker's first ping comes before its answer to the client's
            # ping. The client takes the one for the other, and without this would wait for ever to be connected.
            link.client._status = Client.CONNECTED
        await link.client.subscribe(link._inbox + "*", cb=link._answered)
        link._ever_connected = True
        link._failed_attempts = 0
        link._up.set()
        return link

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    @property
    def closed(self) -> bool:
        return self.client.is_closed

    async def until_connected(self, deadline_s: float) -> None:
        """Return at once while the connection is there; else wait for it.

        Raises:
            BusUnavailable: not there by the deadline, or closed for good.
        """
        if self.client.is_connected:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while not self.client.is_connected:
                    if self.client.is_closed:
                        break
                    await self._up.wait()
                    await asyncio.sleep(_UP_SOON_S)
                else:
                    return
        raise BusUnavailable(
            "the bus is closed" if self.client.is_closed else f"no connection to {self._url} within {deadline_s:g} s"
        )

    async def request(
        self, subject: str, payload: bytes, deadline_s: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """One request, one reply message.

        Raises:
            NobodyThere, DeadlineExceeded, BusUnavailable
        """
        if not self.client.is_connected:
            # Sent now, it would lie in the client's buffer and go out later, long after its deadline.
            started_s = asyncio.get_running_loop().time()
            await self.until_connected(deadline_s)
            deadline_s -= asyncio.get_running_loop().time() - started_s
        # Not the client's own request(): it wakes two tasks more for every answer, and the ``wait_for`` in it forgets,
        # before Python 3.12, a cancellation that comes together with the answer.
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        inbox = f"{self._inbox}{next(self._request_numbers)}"
        self._waiting[inbox] = answer
        timer = loop.call_later(deadline_s, _expire, answer)
        try:
            await self.client.publish(subject, payload, inbox, headers)
            message = await answer
        except _Expired:
            if not self.client.is_connected:
                raise BusUnavailable(f"the connection broke while {subject} was asked, no answer in time") from None
            raise DeadlineExceeded(f"no answer from {subject} within {deadline_s:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject}: {error}") from error
        finally:
            timer.cancel()
            del self._waiting[inbox]
        if message.headers is not None and message.headers.get("Status") == _NO_RESPONDERS:
            raise NobodyThere(f"nobody answers at {subject}")
        return message

    async def _answered(self, message: Msg) -> None:
        answer = self._waiting.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send and forget; while cut off, the client keeps what fits its buffer."""
        try:
            await self.client.publish(subject, payload, reply)
            self._dropped = 0
        except nats.errors.OutboundBufferLimitError:
            if self._dropped == 0:
                self.log.warning("cut off from the broker and the send buffer is full: dropping events")
            self._dropped += 1
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject}: {error}") from error

    async def subscribe(
        self,
        subject: str,
        callback: Callable[[Msg], Awaitable[None]],
        *,
        queue: str = "",
        max_pending: int = 4096,
        settle: bool = True,
    ) -> Subscription:
        """Listen; the client listens again by itself after a reconnect.

        ``settle``: return only when the broker knows, so that others' messages are heard from then on. Without it,
        only answers to what this link sends afterwards are certain to be heard.
        """
        try:
            subscription = await self.client.subscribe(
                subject, queue=queue, cb=callback, pending_msgs_limit=max_pending
            )
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject}: {error}") from error
        if settle:
            await self.settle()
        return subscription

    async def settle(self) -> None:
        """Wait until the broker has seen all that was sent before (not while cut off: then nothing was)."""
        # Not the client's flush: a ping given up on leaves a cancelled future behind, and the late pong then ends the
        # client's read loop. A question to nobody is answered in order just the same.
        if self.client.is_connected:
            with contextlib.suppress(NobodyThere, DeadlineExceeded, BusUnavailable):
                await self.request(self.client.new_inbox(), b"", self.deadline_s)

    async def drain(self, subscription: Subscription) -> None:
        """Hear nothing new on ``subscription``, and let its callback finish with what has arrived."""
        if self.client.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.drain()  # type: ignore[no-untyped-call]
        else:
            await self.drop(subscription)

    async def leave(self, subscription: Subscription) -> None:
        """As ``drain``, and still hear what the broker was about to send as it was told.

        It confirms that it was told while another of its threads may be on the way with one message more; the client's
        own drain throws that one away.
        """
        with contextlib.suppress(nats.errors.Error, OSError):
            if self.client.is_connected:
                await self.client._send_unsubscribe(subscription._id)
                await self.settle()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STRAGGLER_S):
                        await self._closing.wait()
        await self.drop(subscription)

    async def drop(self, subscription: Subscription) -> None:
        """Stop listening at once."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()

    def unique_name(self) -> str:
        """A name nobody else has."""
        return self.client.new_inbox().rpartition(".")[2]

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after every reconnect and when the link closes; returns what undoes it."""
        self._on_reconnect.add(callback)
        return lambda: self._on_reconnect.discard(callback)

    def spawn(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        """Run clean-up that must outlive its cancelled caller; the link owns it, and ends it at closing."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - the last one to hear of it
                self.log.warning(f"{name} failed", reason=str(error))

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, deadline_s: float = 1.0) -> None:
        """Give clean-up ``deadline_s`` seconds, then close."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=min(_STRAGGLER_AT_CLOSING_S, deadline_s))
            self._closing.set()
            if late:
                _, late = await asyncio.wait(late, timeout=deadline_s)
            for task in late:
                task.cancel()
        await self._close_client()

    async def _close_client(self) -> None:
        if not self.client.is_connected:
            # The client would send its buffer over the dead connection, fail, and stop half-way through its closing.
            self.client._pending.clear()
            self.client._pending_data_size = 0
        with contextlib.suppress(OSError):
            await self.client.close()

    async def _error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.log.warning("events dropped: their handler is too slow", subject=error.subject)
        elif self.client.is_connected and not isinstance(error, nats.errors.UnexpectedEOF):
            self.log.warning("broker reported an error", reason=str(error))
        elif isinstance(error, nats.errors.UnexpectedEOF) or (self._ever_connected and self._up.is_set()):
            return  # that it is lost is told next
        else:
            if self.client._transport is not None:
                # The client makes another, and closes only the last one.
                self.client._transport.close()  # type: ignore[no-untyped-call]
            log_every = _LOG_EVERY_ATTEMPTS if self._ever_connected else 1
            if self._failed_attempts % log_every == 0:
                self.log.warning(
                    "broker not reachable, trying again",
                    url=self._url,
                    attempt=self._failed_attempts + 1,
                    reason=str(error) or type(error).__name__,
                )
            self._failed_attempts += 1

    async def _lost(self) -> None:
        self._up.clear()
        if not self.client.is_closed:
            self.log.warning("connection to the broker lost, reconnecting", url=self._url)

    async def _back(self) -> None:
        self.epoch += 1
        self._failed_attempts = 0
        self._up.set()
        self.log.info("connected to the broker again", url=self._url)
        self._notify()

    async def _closed(self) -> None:
        self._up.set()
        self._notify()

    def _notify(self) -> None:
        for callback in tuple(self._on_reconnect):
            callback()
