"""A gateway on a real broker, and the part of the rest of the stack that a test plays itself.

The test speaks the stack's own protocol on the real bus: it registers members, takes jobs from the queue, moves
records, publishes progress and stores files, as scheduler and workers do.
"""

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import aiohttp
import av
import numpy as np

from common.bus.nats_bus import NatsBus
from common.messages.cluster import Service, VideoModelInfo
from common.messages.failures import Failure
from common.messages.subjects import VIDEO_FILES, VIDEO_JOBS, VIDEO_PROGRESS, VIDEO_RECORDS, VIDEO_TIMELINES
from common.messages.video import (
    TimelineSpan,
    VideoFile,
    VideoProgress,
    VideoRecord,
    VideoRequest,
    VideoState,
    VideoTimeline,
)
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from gateway.config import GatewaySettings
from gateway.desk import new_video_id
from gateway.service import Gateway, bind, running_gateway
from tests.support.nats_server import NatsServer, nats_server_process

T = TypeVar("T")

# Who leaves says so, and who is killed comes anew: silence means nothing, where this machine stands still for a while.
PATIENT: dict[str, Any] = {"member_timeout_s": 60.0}
# OpenAI's clients wait five seconds for a connection, which this machine may stand still for.
CLIENT_S = 240.0

MODEL = VideoModelInfo(
    name="demo",
    sizes=((64, 64), (96, 64)),
    frames=(8, 16, 17),
    fps=(4, 24),
    steps=(1, 50),
    guidance_scale=(0.0, 20.0),
    max_prompt_tokens=32,
    default_size=(64, 64),
    default_frames=16,
    default_fps=8,
    default_steps=10,
    default_guidance_scale=7.0,
)
VIDEO_SERVICES = (Service.ENCODER, Service.DIT, Service.VAE)
ALL_SERVICES = (Service.SCHEDULER, *VIDEO_SERVICES)


@contextlib.asynccontextmanager
async def member(
    bus: NatsBus, service: Service, instance: str = "", slot: int | None = None, model: VideoModelInfo | None = MODEL
) -> AsyncIterator[Registration]:
    """A process of the stack, as the others see it."""
    settings = ServiceSettings(instance=instance or f"{service}-0", slot=slot)
    async with Registration(bus, settings, service) as registration:
        await registration.ready(model if service in VIDEO_SERVICES else None)
        yield registration


@dataclass(frozen=True)
class Stack:
    """``bus`` is the test's own connection, ``http`` a client of the gateway."""

    broker: NatsServer
    bus: NatsBus
    gateway: Gateway
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.gateway.url

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """One request; status and JSON body."""
        async with self.http.request(method, path, **options) as response:
            return response.status, await response.json()

    async def create(self, **fields: Any) -> dict[str, Any]:
        status, body = await self.call("POST", "/v1/videos", json={"prompt": "a red ball"} | fields)
        assert status == 200, body
        created: dict[str, Any] = body
        return created

    # --- the scheduler's part ---

    async def take(self) -> str:
        taken = await self.bus.take(VIDEO_JOBS, deadline_s=60.0)
        assert taken is not None
        await taken.ack()
        return taken.job_id

    async def move(self, job_id: str, *states: VideoState, **changes: Any) -> VideoRecord:
        for state in states:
            entry = await self.bus.get(VIDEO_RECORDS, job_id)
            record = entry.value.moved(state, time.time(), **changes)
            await self.bus.replace(VIDEO_RECORDS, job_id, record, entry.revision)
        return record

    async def progress(self, job_id: str, state: VideoState, **details: Any) -> None:
        progress = VideoProgress(job_id=job_id, state=state, steps=MODEL.default_steps, **details)
        await self.bus.publish(VIDEO_PROGRESS, progress, job_id)

    async def complete(self, job_id: str, data: bytes) -> VideoRecord:
        """Carry the job from the queue to its end with ``data`` as its file, until the gateway has heard of it."""
        await self.move(job_id, VideoState.ENCODING, VideoState.DENOISING, VideoState.DECODING)
        stored = await self.bus.put_object(VIDEO_FILES, f"{job_id}/1.mp4", data)
        span = TimelineSpan(
            instance="dit-0",
            slot=0,
            phase="step",
            step=1,
            degree_of_parallelism=1,
            started_at_s=1.0,
            ended_at_s=2.0,
        )
        await self.bus.put(VIDEO_TIMELINES, job_id, VideoTimeline(job_id=job_id, spans=(span,)))
        file = VideoFile(object_name=stored.name, size_bytes=stored.size_bytes, sha256=stored.sha256)
        record = await self.move(job_id, VideoState.COMPLETED, file=file)
        await until(lambda: self._lists_completed(job_id))
        return record

    async def _lists_completed(self, job_id: str) -> bool:
        """One video is read from the broker, the list is what the gateway has been told so far."""
        _, body = await self.call("GET", "/v1/videos", params={"limit": 100})
        return any(video["id"] == job_id and video["status"] == "completed" for video in body.get("data", ()))

    async def fail(self, job_id: str, failure: Failure) -> VideoRecord:
        return await self.move(job_id, VideoState.FAILED, failure=failure)

    async def store(self, created_at_s: float, prompt: str = "stored") -> str:
        """A record put there by another gateway at that time."""
        job_id = new_video_id(int(created_at_s * 1000))
        record = VideoRecord(
            job_id=job_id,
            state=VideoState.CANCELLED,
            request=video_request(prompt),
            created_at_s=created_at_s,
            updated_at_s=created_at_s,
        )
        await self.bus.create(VIDEO_RECORDS, job_id, record)
        return job_id


def video_request(prompt: str = "a red ball") -> VideoRequest:
    return VideoRequest(
        model="demo", prompt=prompt, width=64, height=64, frames=16, fps=8, steps=10, guidance_scale=7.0, seed=1
    )


@contextlib.asynccontextmanager
async def stack(
    broker: NatsServer, services: Sequence[Service] = ALL_SERVICES, **settings: Any
) -> AsyncIterator[Stack]:
    """A gateway with these services announced, ready to take videos if all are."""
    async with contextlib.AsyncExitStack() as opened:
        own = await opened.enter_async_context(await NatsBus.connect(broker.url, name="test", deadline_s=60.0))
        bus = await opened.enter_async_context(await NatsBus.connect(broker.url, name="gateway-0", deadline_s=60.0))
        own_settings = GatewaySettings(port=0, **PATIENT | {"bus_deadline_s": 60.0} | settings)
        listener = opened.enter_context(bind(own_settings))
        gateway = await opened.enter_async_context(running_gateway(bus, own_settings, listener))
        http = await opened.enter_async_context(aiohttp.ClientSession(gateway.url))
        for service in services:
            await opened.enter_async_context(member(own, service))
        running = Stack(broker, own, gateway, http)
        if set(ALL_SERVICES) <= set(services):
            await until(lambda: _status(running, "/readyz", 200))
        yield running


async def until(condition: Callable[[], Awaitable[bool]], deadline_s: float = 60.0) -> None:
    """Wait for something that comes about by messages."""
    async with asyncio.timeout(deadline_s):
        while not await condition():  # noqa: ASYNC110 - the condition is another process's
            await asyncio.sleep(0.02)


async def _status(running: Stack, path: str, status: int) -> bool:
    return (await running.call("GET", path))[0] == status


class ThreadedStack:
    """A stack that runs in a thread of its own, for blocking clients and for sharing among many small tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.stack: Stack

    def run(self, work: Awaitable[T]) -> T:
        """Await ``work`` on the stack's own loop."""

        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(120.0)


@contextlib.contextmanager
def threaded_stack(**settings: Any) -> Iterator[ThreadedStack]:
    threaded = ThreadedStack()
    started, ended = threading.Event(), threading.Event()
    over = asyncio.Event()

    async def serve(broker: NatsServer) -> None:
        async with stack(broker, **settings) as running:
            threaded.stack = running
            started.set()
            await over.wait()

    def main(broker: NatsServer) -> None:
        try:
            threaded._loop.run_until_complete(serve(broker))
        finally:
            threaded._loop.close()
            started.set()
            ended.set()

    with nats_server_process() as broker:
        thread = threading.Thread(target=main, args=(broker,), name="stack")
        thread.start()
        started.wait()
        try:
            yield threaded
        finally:
            if not ended.is_set():
                threaded._loop.call_soon_threadsafe(over.set)
            thread.join(60.0)


@dataclass(frozen=True)
class ServerSentEvent:
    id: str
    data: dict[str, Any]


async def server_sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[ServerSentEvent | str]:
    """The stream's events, and its comments as text, to its end."""
    event_id, data = "", ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            yield line[1:].strip()
        elif line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield ServerSentEvent(event_id, json.loads(data))
            data = ""


def mp4(frames: int = 16, width: int = 64, height: int = 64, fps: int = 8) -> bytes:
    """A film whose frame ``i`` is grey of brightness ``10 * i``."""
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for index in range(frames):
            picture = np.full((height, width, 3), 10 * index, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
