"""Durable work queues: JetStream streams with work-queue retention and one shared pull consumer each."""

import asyncio
import json
from typing import Generic, Self

from nats.aio.msg import Msg

from common.bus.address import address
from common.bus.errors import BusUnavailable, NobodyThere, QueueFull, StorageFull
from common.bus.jetstream import JetStream, Rejected
from common.bus.link import Link
from common.bus.port import Value
from common.bus.prepare import CONSUMER, nanoseconds
from common.messages.base import MessageError
from common.messages.subjects import Body, WorkQueue

# One pull is left standing for so long at most, so that one lost with a broker is soon repeated.
_PULL_S = 5.0
_ANSWER_SLACK_S = 0.5
_PAUSE_S = 0.1
_NOTHING_THERE = ("404", "408")


class TakenJob(Generic[Value]):
    """See ``Taken``."""

    def __init__(self, link: Link, message: Msg, body: Value, job_id: str) -> None:
        self._link = link
        self._message = message
        self._settled = False
        self.body = body
        self.job_id = job_id
        self.attempt = message.metadata.num_delivered

    async def ack(self) -> None:
        await self._settle(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._settle(b"-NAK " + json.dumps({"delay": nanoseconds(delay_s)}).encode() if delay_s > 0 else b"-NAK")

    async def term(self) -> None:
        await self._settle(b"+TERM")

    async def in_progress(self) -> None:
        if not self._settled:
            await self._tell(b"+WPI")

    async def _settle(self, word: bytes) -> None:
        if not self._settled:
            await self._tell(word)
            self._settled = True

    async def _tell(self, word: bytes) -> None:
        try:
            await self._link.request(self._message.reply, word, self._link.deadline_s)
        except NobodyThere as error:
            raise BusUnavailable(f"job {self.job_id}: JetStream does not answer") from error


class Queues:
    """The queue methods of the bus; see ``Bus``."""

    def __init__(self, link: Link, jetstream: JetStream) -> None:
        self._link = link
        self._jetstream = jetstream

    async def enqueue(self, queue: WorkQueue[Body], body: Body, job_id: str, deadline_s: float) -> bool:
        subject = address(queue.pattern, (job_id,))
        try:
            stored = await self._jetstream.publish(
                subject, body.pack(), {"Nats-Msg-Id": job_id}, deadline_s, again=True
            )
        except Rejected as error:
            if "per subject" in error.description:
                return False
            if "maximum messages" in error.description:
                raise QueueFull(f"{queue.name} holds {queue.max_messages} jobs, its bound") from error
            if error.full:
                raise StorageFull(f"{queue.name}: {error.description}") from error
            raise BusUnavailable(str(error)) from error
        return not stored.duplicate

    async def take(self, queue: WorkQueue[Body], deadline_s: float) -> TakenJob[Body] | None:
        clock = asyncio.get_running_loop().time
        end_s = clock() + deadline_s
        while True:
            message = await self._pull(queue, end_s)
            if message is None:
                return None
            job_id = message.subject.rpartition(".")[2]
            try:
                return TakenJob(self._link, message, queue.body.unpack(message.data), job_id)
            except MessageError as error:
                self._link.log.warning("unreadable job removed", queue=queue.name, job_id=job_id, reason=str(error))
                await message.term()

    async def _pull(self, queue: WorkQueue[Body], end_s: float) -> Msg | None:
        """The next message, or None at ``end_s``."""
        clock = asyncio.get_running_loop().time
        await self._link.until_connected(max(0.0, end_s - clock()))
        async with _Inbox(self._link, queue.name) as inbox:
            while True:
                left_s = max(0.0, end_s - clock())
                message = await inbox.ask(min(left_s, _PULL_S))
                if message is not None and _status(message) is None:
                    return message
                if clock() >= end_s:
                    if not self._link.connected:
                        raise BusUnavailable(f"{queue.name}: the connection broke while waiting for a job")
                    return None
                if message is not None and _status(message) not in _NOTHING_THERE:
                    # The consumer is not there, or not yet: its broker may be starting.
                    await asyncio.sleep(min(_PAUSE_S, left_s))
                await self._link.until_connected(max(0.0, end_s - clock()))

    async def queue_depth(self, queue: WorkQueue[Body], deadline_s: float) -> int:
        answer = await self._jetstream.call(f"STREAM.INFO.{queue.name}", None, deadline_s)
        depth: int = answer["state"]["messages"]
        return depth

    async def queued(self, queue: WorkQueue[Body], job_id: str, deadline_s: float) -> bool:
        subject = address(queue.pattern, (job_id,))
        return await self._jetstream.last(queue.name, subject, deadline_s) is not None

    async def remove(self, queue: WorkQueue[Body], job_id: str, deadline_s: float) -> bool:
        subject = address(queue.pattern, (job_id,))
        return await self._jetstream.purge(queue.name, subject, deadline_s) > 0


class _Inbox:
    """Where a taker waits for one message. What arrives when it waits no more is given back, not lost."""

    def __init__(self, link: Link, queue_name: str) -> None:
        self._link = link
        self._queue_name = queue_name
        self._subject = link.client.new_inbox()
        # None: the connection was made anew, and the broker has forgotten what it was asked.
        self._waiting: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()
        # Each pull gets one answer, a job or a status; a broker that was lost gives none.
        self._unanswered = 0
        self._handed_over = False
        self._undo_reconnect = link.on_reconnect(self._forgotten)

    async def __aenter__(self) -> Self:
        self._subscription = await self._link.subscribe(self._subject, self._heard, settle=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._undo_reconnect()
        unwanted = self._waiting.result() if self._waiting.done() and not self._handed_over else None
        self._waiting.cancel()
        if unwanted is None and not self._unanswered:
            await self._link.drop(self._subscription)
        else:
            self._link.spawn(self._leave(unwanted), "leaving a queue")

    async def ask(self, wait_s: float) -> Msg | None:
        """Ask for one message that is there within ``wait_s``; a status message or None when there is none."""
        if self._waiting.done():
            self._waiting = asyncio.get_running_loop().create_future()
        pull = {"batch": 1, "expires": nanoseconds(wait_s)} if wait_s > 0 else {"batch": 1, "no_wait": True}
        self._unanswered += 1
        await self._link.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._queue_name}.{CONSUMER}", json.dumps(pull).encode(), self._subject
        )
        await asyncio.wait({self._waiting}, timeout=wait_s + _ANSWER_SLACK_S)
        if not self._waiting.done():
            return None
        message = self._waiting.result()
        self._handed_over = message is not None and _status(message) is None
        return message

    def _forgotten(self) -> None:
        if not self._waiting.done():
            self._waiting.set_result(None)

    async def _heard(self, message: Msg) -> None:
        self._unanswered -= 1
        if not self._waiting.done():
            self._waiting.set_result(message)
        elif _status(message) is None:
            await message.nak()

    async def _leave(self, unwanted: Msg | None) -> None:
        if unwanted is not None and _status(unwanted) is None:
            await unwanted.nak()
        await self._link.leave(self._subscription)


def _status(message: Msg) -> str | None:
    return message.headers.get("Status") if message.headers else None
