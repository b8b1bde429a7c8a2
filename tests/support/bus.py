"""What the bus's contract is tested with: a connected bus, its log lines, and small queues and buckets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import nats

from common.bus.nats_bus import NatsBus
from common.messages.cluster import Heartbeat
from common.messages.subjects import Bucket, EventSubject, ObjectBucket, RequestSubject, WorkQueue
from common.messages.video import EncodePrompt, StepFinished, VideoQueued
from tests.support.nats_server import NatsServer

JOBS = WorkQueue("TEST_JOBS", "test.jobs.{}", VideoQueued, max_messages=4)
RECORDS = Bucket("test_records", Heartbeat, max_bytes=16 * 1024 * 1024)
FILES = ObjectBucket("test_files", max_bytes=64 * 1024 * 1024)
ECHO = RequestSubject("test.{}.echo", EncodePrompt, EncodePrompt)
STEPS = EventSubject("test.step.{}", StepFinished)


class LogLines:
    """Takes the bus's log lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, **details: object) -> None:
        self.lines.append((event, details))

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


@contextlib.asynccontextmanager
async def connected_bus(
    server: NatsServer,
    name: str = "test",
    *,
    deadline_s: float = 60.0,
    ack_wait_s: float = 30.0,
    log: LogLines | None = None,
) -> AsyncIterator[NatsBus]:
    """A bus with the test queues and buckets, closed at the end. ``deadline_s`` holds from then on."""
    bus = await NatsBus.connect(
        server.url, name, deadline_s=deadline_s, connect_deadline_s=60.0, on_log=log or LogLines()
    )
    async with bus:
        await bus.prepare(
            queues=[JOBS], buckets=[RECORDS], object_buckets=[FILES], ack_wait_s=ack_wait_s, deadline_s=60.0
        )
        yield bus


@contextlib.asynccontextmanager
async def stranger(server: NatsServer) -> AsyncIterator[nats.NATS]:
    """A connection of the broker's own client, as others make it."""
    client = await nats.connect(server.url, connect_timeout=60)
    while client.is_connecting:
        # It took the broker's first ping for the answer to its own; see ``Link.open``.
        await client.close()
        client = await nats.connect(server.url, connect_timeout=60)
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def relay(server: NatsServer, before_answers: Iterator[bytes]) -> AsyncIterator[str]:
    """The address of a relay to the broker. ``before_answers``: what it says on its own before the broker's first
    answer, on each connection in turn. All have to have ended when the block does."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(await from_broker.readline() + next(before_answers))
        async with asyncio.TaskGroup() as pipes:
            pipes.create_task(pipe(reader, to_broker))
            pipes.create_task(pipe(from_broker, writer))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as between:
        host, port = between.sockets[0].getsockname()
        yield f"nats://{host}:{port}"
    await eventually(lambda: len(asyncio.all_tasks()) == 1)


async def eventually(condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Return once ``condition`` holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to wait on
            await asyncio.sleep(0.01)


def prompt(text: str = "a fox", job_id: str = "job-1") -> EncodePrompt:
    return EncodePrompt(job_id=job_id, prompt=text)


def step(number: int, instance: str = "dit-0") -> StepFinished:
    return StepFinished(
        job_id="job-1",
        epoch=1,
        instance=instance,
        slots=(0,),
        step=number,
        steps=30,
        started_at_s=0.0,
        ended_at_s=1.0,
    )


def life(instance: str, incarnation: str = "1") -> Heartbeat:
    return Heartbeat(instance=instance, incarnation=incarnation)
