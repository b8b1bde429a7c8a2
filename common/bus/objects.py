"""Finished files: stored in chunks, seen whole or not at all, read chunk by chunk.

The layout is the broker's own (chunks under a unique id, one message that describes the object and names that id), so
its command line tool can list and fetch what lies here.
"""

import asyncio
import base64
import hashlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from common.bus.errors import (
    BadAddress,
    BusError,
    BusUnavailable,
    NobodyThere,
    ObjectDamaged,
    ObjectMissing,
    StorageFull,
)
from common.bus.jetstream import JetStream, Rejected, Stored
from common.bus.link import Link
from common.bus.port import ObjectInfo
from common.bus.prepare import object_stream
from common.bus.reader import Reader, ReaderLost
from common.messages.subjects import ObjectBucket

CHUNK_BYTES = 256 * 1024
_CHUNKS_ON_THE_WAY = 8
_CHUNKS_PER_PULL = 16
_DESCRIBE_ATTEMPTS = 8
_DIGEST = "SHA-256="


@dataclass(frozen=True)
class _Described:
    """An object as its description has it; ``sequence`` is the description's own."""

    info: ObjectInfo
    unique_id: str
    sequence: int
    deleted: bool


class Objects:
    """The object methods of the bus; see ``Bus``."""

    def __init__(self, link: Link, jetstream: JetStream) -> None:
        self._link = link
        self._jetstream = jetstream

    async def put(
        self, bucket: ObjectBucket, name: str, chunks: AsyncIterable[bytes] | bytes, deadline_s: float
    ) -> ObjectInfo:
        _check(name)
        unique_id = self._link.unique_name()
        upload = _Upload(self._jetstream, f"$O.{bucket.name}.C.{unique_id}", deadline_s)
        try:
            async for piece in _pieces(chunks):
                await upload.send(piece)
            await upload.all_stored()
            info = ObjectInfo(name, upload.size_bytes, upload.digest.hexdigest())
            describing = self._describe(bucket, info, unique_id, deadline_s, chunks=upload.count)
            await upload.end_with(describing)
        except BaseException as error:
            # Until it is described nobody sees it; what has been sent must not stay and take up room.
            self._link.spawn(self._abandon(bucket, name, unique_id, upload), "removing an unfinished object")
            if isinstance(error, Rejected):
                raise _named(bucket, error) from error
            raise
        return info

    async def get(self, bucket: ObjectBucket, name: str, deadline_s: float) -> AsyncGenerator[bytes, None]:
        described = await self._present(bucket, name, deadline_s)
        digest, read_bytes = hashlib.sha256(), 0
        if described.info.size_bytes > 0:
            async with aclosing(self._chunks(bucket, described, deadline_s)) as chunks:
                async for chunk in chunks:
                    digest.update(chunk)
                    read_bytes += len(chunk)
                    yield chunk
        if (read_bytes, digest.hexdigest()) != (described.info.size_bytes, described.info.sha256):
            raise ObjectDamaged(f"{name}: read {read_bytes} bytes that are not the {described.info.size_bytes} stored")

    async def info(self, bucket: ObjectBucket, name: str, deadline_s: float) -> ObjectInfo:
        return (await self._present(bucket, name, deadline_s)).info

    async def delete(self, bucket: ObjectBucket, name: str, deadline_s: float) -> None:
        described = await self._present(bucket, name, deadline_s)
        info = ObjectInfo(name, 0, "")
        try:
            await self._describe(bucket, info, described.unique_id, deadline_s, chunks=0, deleted=True)
            await self._jetstream.purge(object_stream(bucket), f"$O.{bucket.name}.C.{described.unique_id}", deadline_s)
        except Rejected as error:
            raise _named(bucket, error) from error

    async def _describe(
        self,
        bucket: ObjectBucket,
        info: ObjectInfo,
        unique_id: str,
        deadline_s: float,
        *,
        chunks: int,
        deleted: bool = False,
    ) -> None:
        """Write the description over the former one, and remove the chunks that only the former one named."""
        description: dict[str, Any] = {
            "name": info.name,
            "bucket": bucket.name,
            "nuid": unique_id,
            "size": info.size_bytes,
            "mtime": "0001-01-01T00:00:00Z",  # the time is the message's own
            "chunks": chunks,
            "digest": _DIGEST + base64.urlsafe_b64encode(bytes.fromhex(info.sha256)).decode(),
            "options": {"max_chunk_size": CHUNK_BYTES},
        }
        if deleted:
            description |= {"deleted": True, "digest": ""}
        for attempt in range(_DESCRIBE_ATTEMPTS):
            former = await self._described(bucket, info.name, deadline_s)
            # Compare-and-set: of two writers each removes the chunks of exactly the one it replaced.
            headers = {
                "Nats-Rollup": "sub",
                "Nats-Expected-Last-Subject-Sequence": str(former.sequence if former else 0),
            }
            try:
                subject = _description_subject(bucket, info.name)
                await self._jetstream.publish(subject, json.dumps(description).encode(), headers, deadline_s)
                break
            except Rejected as error:
                if not error.wrong_last_sequence or attempt == _DESCRIBE_ATTEMPTS - 1:
                    raise
        if former is not None and not former.deleted and former.unique_id != unique_id:
            self._link.spawn(
                self._purge(bucket, f"$O.{bucket.name}.C.{former.unique_id}"), "removing a replaced object"
            )

    async def _chunks(
        self, bucket: ObjectBucket, described: _Described, deadline_s: float
    ) -> AsyncGenerator[bytes, None]:
        """The chunks in order; after a reconnect it goes on behind the last one."""
        clock = asyncio.get_running_loop().time
        left_bytes, next_sequence, end_s = described.info.size_bytes, 1, clock() + deadline_s
        while left_bytes > 0:
            reader = Reader(
                self._link,
                self._jetstream,
                object_stream(bucket),
                f"$O.{bucket.name}.C.{described.unique_id}",
                batch=_CHUNKS_PER_PULL,
                from_sequence=next_sequence,
            )
            try:
                if await reader.open(end_s - clock()) == 0:
                    raise ObjectDamaged(f"{described.info.name}: replaced or deleted while it was read")
                while left_bytes > 0:
                    item = await reader.next(deadline_s)
                    left_bytes -= len(item.data)
                    next_sequence = item.sequence + 1
                    yield item.data
                    end_s = clock() + deadline_s
                    if item.pending == 0 and left_bytes > 0:
                        raise ObjectDamaged(f"{described.info.name}: {left_bytes} bytes are missing")
            except (ReaderLost, NobodyThere) as error:
                if clock() >= end_s or self._link.closed:
                    raise BusUnavailable(f"{described.info.name}: {error}") from error
            finally:
                await reader.close()

    async def _present(self, bucket: ObjectBucket, name: str, deadline_s: float) -> _Described:
        _check(name)
        described = await self._described(bucket, name, deadline_s)
        if described is None or described.deleted:
            raise ObjectMissing(name)
        return described

    async def _described(self, bucket: ObjectBucket, name: str, deadline_s: float) -> _Described | None:
        stored = await self._jetstream.last(object_stream(bucket), _description_subject(bucket, name), deadline_s)
        if stored is None:
            return None
        try:
            description = json.loads(stored.data)
            digest = base64.urlsafe_b64decode(str(description.get("digest", "")).removeprefix(_DIGEST))
            info = ObjectInfo(name, int(description["size"]), digest.hex())
            return _Described(info, str(description["nuid"]), stored.sequence, bool(description.get("deleted")))
        except (ValueError, KeyError, TypeError) as error:
            raise ObjectDamaged(f"{name}: its description cannot be read: {error}") from error

    async def _abandon(self, bucket: ObjectBucket, name: str, unique_id: str, upload: "_Upload") -> None:
        await upload.settled()
        described = await self._described(bucket, name, self._link.deadline_s)
        # The description may have been stored and only its receipt lost: then the object is whole, and stays.
        if described is None or described.unique_id != unique_id:
            await self._purge(bucket, upload.subject)

    async def _purge(self, bucket: ObjectBucket, subject: str) -> None:
        await self._jetstream.purge(object_stream(bucket), subject, self._link.deadline_s)


class _Upload:
    """Chunks on their way into the store, a few at a time."""

    def __init__(self, jetstream: JetStream, subject: str, deadline_s: float) -> None:
        self._jetstream = jetstream
        self._deadline_s = deadline_s
        self._on_the_way: deque[asyncio.Task[Stored]] = deque()
        self._end: asyncio.Task[None] | None = None
        self._last_sequence = 0
        self.subject = subject
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.count = 0

    async def send(self, piece: bytes) -> None:
        """Send one more chunk, once there is room on the way."""
        if len(self._on_the_way) >= _CHUNKS_ON_THE_WAY:
            await self._first_stored()
        self.digest.update(piece)
        self.size_bytes += len(piece)
        self.count += 1
        storing = self._jetstream.publish(self.subject, piece, None, self._deadline_s)
        self._on_the_way.append(asyncio.create_task(storing, name="storing a chunk"))

    async def all_stored(self) -> None:
        """Wait until every chunk is stored, in order."""
        while self._on_the_way:
            await self._first_stored()

    async def end_with(self, description: Coroutine[None, None, None]) -> None:
        """Write the description, to its end even if nobody waits for it any more."""
        self._end = asyncio.create_task(description, name="describing an object")
        await asyncio.shield(self._end)

    async def settled(self) -> None:
        """Wait until nothing is on the way any more: it could still be stored behind a removal's back."""
        await asyncio.gather(*self._on_the_way, *([self._end] if self._end else []), return_exceptions=True)
        self._on_the_way.clear()

    async def _first_stored(self) -> None:
        stored = await asyncio.shield(self._on_the_way[0])
        self._on_the_way.popleft()
        if stored.sequence <= self._last_sequence:
            raise BusUnavailable(f"{self.subject}: the connection broke, chunks came out of order; put it again")
        self._last_sequence = stored.sequence


async def _pieces(chunks: AsyncIterable[bytes] | bytes) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of ``CHUNK_BYTES``, the last one as long as it comes."""
    if isinstance(chunks, bytes):
        for start in range(0, len(chunks), CHUNK_BYTES):
            yield chunks[start : start + CHUNK_BYTES]
        return
    waiting = bytearray()
    async for chunk in chunks:
        waiting += chunk
        while len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
    if waiting:
        yield bytes(waiting)


def _description_subject(bucket: ObjectBucket, name: str) -> str:
    return f"$O.{bucket.name}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _check(name: str) -> None:
    if not name:
        raise BadAddress("an object needs a name")


def _named(bucket: ObjectBucket, error: Rejected) -> BusError:
    if error.full:
        return StorageFull(f"object store {bucket.name}: {error.description}")
    return BusUnavailable(str(error))
