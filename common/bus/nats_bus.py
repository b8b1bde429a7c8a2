"""``Bus`` over NATS: request/reply and events on its core, queues, buckets and objects on JetStream."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any, Self

from common.bus import requests
from common.bus.address import address
from common.bus.buckets import Buckets
from common.bus.jetstream import JetStream
from common.bus.link import Link
from common.bus.log import BusLog, LogSink
from common.bus.objects import Objects
from common.bus.port import Entry, EventHandler, ObjectInfo, RequestHandler
from common.bus.prepare import (
    bucket_config,
    consumer_config,
    ensure_consumer,
    ensure_stream,
    object_config,
    queue_config,
)
from common.bus.queues import Queues, TakenJob
from common.bus.watching import BucketWatch
from common.messages.failures import Stage
from common.messages.subjects import (
    Body,
    Bucket,
    EventSubject,
    ObjectBucket,
    Reply,
    Request,
    RequestSubject,
    WorkQueue,
)


class NatsBus:
    """The bus of one process; ``connect`` makes one. Every method is described at ``Bus``."""

    def __init__(self, link: Link, stage: Stage) -> None:
        self._link = link
        self._stage = stage
        jetstream = JetStream(link)
        self._jetstream = jetstream
        self._queues = Queues(link, jetstream)
        self._buckets = Buckets(link, jetstream)
        self._objects = Objects(link, jetstream)
        self._handlings: set[requests.Handling] = set()

    @classmethod
    async def connect(
        cls,
        url: str,
        name: str,
        *,
        stage: Stage | None = None,
        deadline_s: float = 5.0,
        connect_deadline_s: float | None = None,
        on_log: LogSink | None = None,
    ) -> Self:
        """Connect to the broker at ``url`` (several of a cluster: separated by commas), trying until it works.

        Args:
            name: the process as the broker and the logs show it, such as ``dit-0``.
            stage: what the failures answered for this process's handlers name; by default the stage that ``name``
                begins with, or the gateway where it begins with none.
            deadline_s: for every wait that has no deadline of its own.
            connect_deadline_s: give up connecting after so long; None never does.
            on_log: takes the log lines instead of structlog.

        Raises:
            BusUnavailable: no connection by ``connect_deadline_s``.
        """
        link = await Link.open(url, name, BusLog(name, on_log), deadline_s, connect_deadline_s)
        return cls(link, stage or _stage_of(name))

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def prepare(
        self,
        *,
        queues: Sequence[WorkQueue[Any]] = (),
        buckets: Sequence[Bucket[Any]] = (),
        object_buckets: Sequence[ObjectBucket] = (),
        ack_wait_s: float = 30.0,
        replicas: int = 1,
        deadline_s: float | None = None,
    ) -> None:
        wait_s = self._wait_s(deadline_s)
        for bucket in buckets:
            await ensure_stream(self._jetstream, bucket_config(bucket, replicas), wait_s)
        for object_bucket in object_buckets:
            await ensure_stream(self._jetstream, object_config(object_bucket, replicas), wait_s)
        for queue in queues:
            await ensure_stream(self._jetstream, queue_config(queue, replicas), wait_s)
            await ensure_consumer(self._jetstream, queue.name, consumer_config(ack_wait_s, replicas), wait_s)

    # --- request and reply, events ---

    async def request(
        self, subject: RequestSubject[Request, Reply], request: Request, *tokens: str, deadline_s: float | None = None
    ) -> Reply:
        return await requests.request(self._link, subject, request, tokens, self._wait_s(deadline_s))

    async def serve(
        self,
        subject: RequestSubject[Request, Reply],
        handler: RequestHandler[Request, Reply],
        *tokens: str,
        queue_group: str | None = None,
        max_in_flight: int = 64,
    ) -> requests.Serving:
        serving = requests.Serving(self._link, self._stage, subject, handler, max_in_flight)
        await self._start(serving, address(subject.pattern, tokens), queue_group or "", requests.MAX_WAITING)
        return serving

    async def publish(self, subject: EventSubject[Body], body: Body, *tokens: str) -> None:
        await self._link.publish(address(subject.pattern, tokens), body.pack())

    async def subscribe(
        self, subject: EventSubject[Body], handler: EventHandler[Body], *tokens: str, max_pending: int = 4096
    ) -> requests.Listening:
        listening = requests.Listening(self._link, subject, handler)
        await self._start(listening, address(subject.pattern, tokens) if tokens else subject.all, "", max_pending)
        return listening

    async def _start(self, handling: requests.Handling, subject: str, queue: str, max_pending: int) -> None:
        self._handlings.add(handling)
        try:
            await handling.start(subject, queue, max_pending, lambda: self._handlings.discard(handling))
        except BaseException:
            self._handlings.discard(handling)
            raise

    # --- work queues ---

    async def enqueue(
        self, queue: WorkQueue[Body], body: Body, job_id: str, *, deadline_s: float | None = None
    ) -> bool:
        return await self._queues.enqueue(queue, body, job_id, self._wait_s(deadline_s))

    async def take(self, queue: WorkQueue[Body], deadline_s: float | None = None) -> TakenJob[Body] | None:
        return await self._queues.take(queue, self._wait_s(deadline_s))

    async def queue_depth(self, queue: WorkQueue[Body], *, deadline_s: float | None = None) -> int:
        return await self._queues.queue_depth(queue, self._wait_s(deadline_s))

    async def queued(self, queue: WorkQueue[Body], job_id: str, *, deadline_s: float | None = None) -> bool:
        return await self._queues.queued(queue, job_id, self._wait_s(deadline_s))

    async def remove(self, queue: WorkQueue[Body], job_id: str, *, deadline_s: float | None = None) -> bool:
        return await self._queues.remove(queue, job_id, self._wait_s(deadline_s))

    # --- buckets ---

    async def get(self, bucket: Bucket[Body], key: str, *, deadline_s: float | None = None) -> Entry[Body]:
        return await self._buckets.get(bucket, key, self._wait_s(deadline_s))

    async def create(self, bucket: Bucket[Body], key: str, value: Body, *, deadline_s: float | None = None) -> int:
        return await self._buckets.create(bucket, key, value, self._wait_s(deadline_s))

    async def replace(
        self, bucket: Bucket[Body], key: str, value: Body, revision: int, *, deadline_s: float | None = None
    ) -> int:
        return await self._buckets.replace(bucket, key, value, revision, self._wait_s(deadline_s))

    async def put(self, bucket: Bucket[Body], key: str, value: Body, *, deadline_s: float | None = None) -> int:
        return await self._buckets.put(bucket, key, value, self._wait_s(deadline_s))

    async def delete(
        self, bucket: Bucket[Body], key: str, revision: int | None = None, *, deadline_s: float | None = None
    ) -> None:
        await self._buckets.delete(bucket, key, revision, self._wait_s(deadline_s))

    async def keys(self, bucket: Bucket[Body], *, deadline_s: float | None = None) -> list[str]:
        return await self._buckets.keys(bucket, self._wait_s(deadline_s))

    async def entries(self, bucket: Bucket[Body], *, deadline_s: float | None = None) -> list[Entry[Body]]:
        return await self._buckets.entries(bucket, self._wait_s(deadline_s))

    def watch(self, bucket: Bucket[Body], key: str | None = None) -> BucketWatch[Body]:
        return BucketWatch(self._link, self._jetstream, bucket, key)

    # --- objects ---

    async def put_object(
        self, bucket: ObjectBucket, name: str, chunks: AsyncIterable[bytes] | bytes, *, deadline_s: float | None = None
    ) -> ObjectInfo:
        return await self._objects.put(bucket, name, chunks, self._wait_s(deadline_s))

    def get_object(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> AsyncIterator[bytes]:
        return self._objects.get(bucket, name, self._wait_s(deadline_s))

    async def object_info(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> ObjectInfo:
        return await self._objects.info(bucket, name, self._wait_s(deadline_s))

    async def delete_object(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> None:
        await self._objects.delete(bucket, name, self._wait_s(deadline_s))

    # --- the end ---

    async def drain(self, deadline_s: float | None = None) -> None:
        wait_s = self._wait_s(deadline_s)
        await asyncio.gather(*(handling.stop(wait_s) for handling in tuple(self._handlings)))
        await self._link.settle()
        await self._link.close()

    async def close(self) -> None:
        await asyncio.gather(*(handling.cancel() for handling in tuple(self._handlings)))
        await self._link.close()

    def _wait_s(self, deadline_s: float | None) -> float:
        return self._link.deadline_s if deadline_s is None else deadline_s


def _stage_of(name: str) -> Stage:
    """The stage an instance's name begins with (``dit-0``); whoever has none stands at the edge."""
    kind = name.rpartition("-")[0] or name
    return Stage(kind) if kind in set(Stage) else Stage.GATEWAY
