"""Reading a stream in order, in batches that the reader asks for: no message is lost, repeated or piled up unread."""

import asyncio
import json
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from common.bus.errors import BusUnavailable, DeadlineExceeded, NobodyThere
from common.bus.jetstream import JetStream, Rejected
from common.bus.link import Link
from common.bus.prepare import nanoseconds

_PULL_EXPIRES_S = 30.0
_HEARTBEAT_S = 5.0
# A consumer nobody reads is removed by the broker after so long.
_ABANDONED_S = 60.0

_HEARTBEAT_STATUS = "100"
# The broker ends a pull: nothing there, time over, or its batch or bytes are used up.
_PULL_ENDED = {"404", "408"}


class ReaderLost(Exception):
    """The thread is broken (a reconnect, a lost message, a consumer gone): open a new reader and go on from there."""


@dataclass(frozen=True)
class Item:
    """A message of the stream. ``pending``: how many more there were when the broker sent it."""

    subject: str
    data: bytes
    headers: dict[str, str] | None
    sequence: int
    pending: int


class Reader:
    """One pass over the messages of ``stream`` on ``subjects``, and what comes after.

    ``last_per_subject``: begin with the last message of each subject instead of all. ``from_sequence``: begin there.
    """

    def __init__(
        self,
        link: Link,
        jetstream: JetStream,
        stream: str,
        subjects: str,
        *,
        batch: int,
        last_per_subject: bool = False,
        from_sequence: int = 1,
        headers_only: bool = False,
    ) -> None:
        self._link = link
        self._jetstream = jetstream
        self._stream = stream
        self._name = link.unique_name()
        self._inbox = link.client.new_inbox()
        self._batch = batch
        self._config: dict[str, object] = {
            "name": self._name,
            "filter_subject": subjects,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": nanoseconds(_ABANDONED_S),
            "headers_only": headers_only,
        }
        if last_per_subject:
            self._config["deliver_policy"] = "last_per_subject"
        elif from_sequence > 1:
            self._config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": from_sequence}
        else:
            self._config["deliver_policy"] = "all"
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._asked = 0
        self._read = 0
        self._undo_reconnect = link.on_reconnect(lambda: self._arrived.put_nowait(None))

    async def open(self, deadline_s: float) -> int:
        """Begin; how many messages are there to read at once.

        Raises:
            NotPrepared, BusUnavailable, DeadlineExceeded
        """
        await self._link.until_connected(deadline_s)
        self._subscription = await self._link.subscribe(self._inbox, self._arrive, settle=False)
        try:
            answer = await self._jetstream.call(
                f"CONSUMER.CREATE.{self._stream}.{self._name}",
                {"stream_name": self._stream, "config": self._config},
                deadline_s,
            )
        except Rejected as error:
            raise BusUnavailable(f"{self._stream} cannot be read: {error.description}") from error
        pending: int = answer["num_pending"]
        return pending

    async def next(self, deadline_s: float | None) -> Item:
        """The next message; None waits for as long as the broker gives signs of life.

        Raises:
            ReaderLost: begin anew.
            DeadlineExceeded: nothing came.
        """
        clock = asyncio.get_running_loop().time
        end_s = None if deadline_s is None else clock() + deadline_s
        while True:
            if self._asked == 0:
                await self._pull()
            silence_s = _HEARTBEAT_S * 2.5
            wait_s = silence_s if end_s is None else min(silence_s, end_s - clock())
            message = await self._next_arrived(wait_s)
            if message is None:
                if end_s is not None and clock() >= end_s:
                    raise DeadlineExceeded(f"{self._stream}: nothing within {deadline_s:g} s")
                raise ReaderLost("no sign of life from the broker")
            status = message.headers.get("Status") if message.headers else None
            if status is None:
                return self._item(message)
            self._note(status, message)

    async def close(self) -> None:
        """Stop reading; the broker removes the consumer."""
        self._undo_reconnect()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._link.drop(subscription)
            if self._link.connected:
                await self._link.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._name}", b"")

    async def _arrive(self, message: Msg) -> None:
        # Never more than one batch and a few signs of life: the broker sends only what was asked for.
        self._arrived.put_nowait(message)

    async def _pull(self) -> None:
        if not self._link.connected:
            raise ReaderLost("not connected")
        self._asked = self._batch
        request = {
            "batch": self._batch,
            "expires": nanoseconds(_PULL_EXPIRES_S),
            "idle_heartbeat": nanoseconds(_HEARTBEAT_S),
        }
        await self._link.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}", json.dumps(request).encode(), self._inbox
        )

    async def _next_arrived(self, wait_s: float) -> Msg | None:
        if self._arrived.empty():
            try:
                async with asyncio.timeout(wait_s):
                    message = await self._arrived.get()
            except TimeoutError:
                return None
        else:
            message = self._arrived.get_nowait()
        if message is None:
            raise ReaderLost("the connection was made anew" if not self._link.closed else "the bus is closed")
        return message

    def _item(self, message: Msg) -> Item:
        tokens = message.reply.split(".")
        # $JS.ACK.STREAM.CONSUMER.DELIVERED.STREAM_SEQ.CONSUMER_SEQ.TIME.PENDING, or with domain and account after ACK.
        first = 2 if len(tokens) == 9 else 4
        sequence, read, pending = int(tokens[first + 3]), int(tokens[first + 4]), int(tokens[first + 6])
        if read != self._read + 1:
            raise ReaderLost(f"message {self._read + 1} of {self._stream} did not arrive")
        self._read = read
        self._asked -= 1
        return Item(message.subject, message.data, message.headers, sequence, pending)

    def _note(self, status: str, message: Msg) -> None:
        headers = message.headers or {}
        if status == _HEARTBEAT_STATUS:
            if int(headers.get("Nats-Last-Consumer", self._read)) > self._read:
                raise ReaderLost(f"a message of {self._stream} did not arrive")
        elif status in _PULL_ENDED:
            self._asked = 0
        else:
            raise ReaderLost(headers.get("Description", f"status {status}"))


async def read_all(
    link: Link, jetstream: JetStream, stream: str, subjects: str, *, headers_only: bool, deadline_s: float
) -> list[Item]:
    """The last message of every subject, in one pass.

    Raises:
        NotPrepared, BusUnavailable, DeadlineExceeded
    """
    clock = asyncio.get_running_loop().time
    end_s = clock() + deadline_s
    while True:
        reader = Reader(link, jetstream, stream, subjects, batch=256, last_per_subject=True, headers_only=headers_only)
        try:
            items: list[Item] = []
            pending = await reader.open(end_s - clock())
            while pending > 0:
                item = await reader.next(end_s - clock())
                items.append(item)
                pending = item.pending
            return items
        except (ReaderLost, NobodyThere) as error:
            if clock() >= end_s or link.closed:
                raise BusUnavailable(f"{stream}: {error}") from error
        finally:
            await reader.close()
