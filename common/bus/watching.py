"""Following a bucket: first what is there, then every change, through reconnects and restarts of the broker."""

import asyncio
from collections import deque
from typing import Generic, Self

from common.bus.address import checked_key
from common.bus.buckets import is_deletion, key_of, subject_of
from common.bus.errors import BusUnavailable, DeadlineExceeded, NobodyThere
from common.bus.jetstream import JetStream
from common.bus.link import Link
from common.bus.port import CaughtUp, Change, Value
from common.bus.prepare import bucket_stream
from common.bus.reader import Item, Reader, ReaderLost
from common.messages.base import MessageError
from common.messages.subjects import Bucket

_BATCH = 256
_PAUSE_S = 0.1


class BucketWatch(Generic[Value]):
    """See ``Watch``. Knows each key's last revision, so that a new reader's snapshot yields only what has changed."""

    def __init__(self, link: Link, jetstream: JetStream, bucket: Bucket[Value], key: str | None) -> None:
        self._link = link
        self._jetstream = jetstream
        self._bucket = bucket
        self._subjects = subject_of(bucket, ">" if key is None else checked_key(key))
        self._reader: Reader | None = None
        self._known: dict[str, int] = {}
        # Keys of the snapshot under way; None when there is none.
        self._snapshot: set[str] | None = None
        self._caught_up = False
        self._stopped = False
        self._ready: deque[Change[Value] | CaughtUp] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change[Value] | CaughtUp:
        while not self._ready:
            if self._stopped or self._link.closed:
                await self.stop()
                raise StopAsyncIteration
            try:
                if self._reader is None:
                    await self._begin()
                else:
                    self._take_in(await self._reader.next(None))
            except ReaderLost:
                await self._leave_reader()
        return self._ready.popleft()

    async def stop(self) -> None:
        self._stopped = True
        await self._leave_reader()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _begin(self) -> None:
        reader = Reader(
            self._link,
            self._jetstream,
            bucket_stream(self._bucket),
            self._subjects,
            batch=_BATCH,
            last_per_subject=True,
        )
        self._reader = reader
        try:
            pending = await reader.open(self._link.deadline_s)
        except (BusUnavailable, DeadlineExceeded, NobodyThere) as error:
            await self._leave_reader()
            if not self._link.closed:
                self._link.log.warning("watch waits for the broker", bucket=self._bucket.name, reason=str(error))
                await asyncio.sleep(_PAUSE_S)
            return
        except BaseException:
            await self._leave_reader()
            raise
        self._snapshot = set()
        if pending == 0:
            self._end_snapshot()

    async def _leave_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    def _take_in(self, item: Item) -> None:
        key = key_of(self._bucket, item.subject)
        if is_deletion(item.headers):
            if self._known.pop(key, None) is not None:
                self._ready.append(Change(key, None, item.sequence))
        else:
            if self._snapshot is not None:
                self._snapshot.add(key)
            if self._known.get(key) != item.sequence:
                self._known[key] = item.sequence
                self._add(key, item)
        if self._snapshot is not None and item.pending == 0:
            self._end_snapshot()

    def _add(self, key: str, item: Item) -> None:
        try:
            self._ready.append(Change(key, self._bucket.body.unpack(item.data), item.sequence))
        except MessageError as error:
            self._link.log.warning("unreadable value left out", bucket=self._bucket.name, key=key, reason=str(error))

    def _end_snapshot(self) -> None:
        present, self._snapshot = self._snapshot or set(), None
        for key in [key for key in self._known if key not in present]:
            self._ready.append(Change(key, None, self._known.pop(key)))
        if not self._caught_up:
            self._caught_up = True
            self._ready.append(CaughtUp())
