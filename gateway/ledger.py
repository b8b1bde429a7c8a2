"""What the gateway knows of the videos without asking: every record as the bucket's watch tells it, and the latest
progress of those that run. Lists and event streams are answered from here.
"""

import asyncio
import contextlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from common.bus.port import Bus, Change, Entry
from common.messages.subjects import VIDEO_PROGRESS, VIDEO_RECORDS
from common.messages.video import VideoProgress, VideoRecord, VideoState

_KEPT_DELETIONS = 4096

# Where a video stands in the order of creation.
Place = tuple[float, str]


@dataclass(frozen=True)
class Snapshot:
    """A record and the progress that belongs to its state."""

    record: VideoRecord
    progress: VideoProgress | None


@dataclass(frozen=True)
class Page:
    records: list[VideoRecord]
    has_more: bool


class VideoLedger:
    """A view of the record bucket, never ahead of it and at most a moment behind.

    Bounded: beyond ``capacity`` the oldest ended videos are left out (they still are in the bucket).
    """

    def __init__(self, bus: Bus, capacity: int) -> None:
        self._bus = bus
        self._capacity = capacity
        self._entries: dict[str, Entry[VideoRecord]] = {}
        self._order: list[Place] = []
        self._progress: dict[str, VideoProgress] = {}
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[VideoState] = Counter()
        self._caught_up = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self, deadline_s: float) -> AsyncIterator[None]:
        """Keep the view current while the block runs; it has seen the whole bucket when the block starts."""
        progress = await self._bus.subscribe(VIDEO_PROGRESS, self.progressed)
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(), name="watch-records")
                try:
                    async with asyncio.timeout(deadline_s):
                        await self._caught_up.wait()
                    yield
                finally:
                    watching.cancel()
        finally:
            await progress.stop()

    async def _watch(self) -> None:
        async with self._bus.watch(VIDEO_RECORDS) as changes:
            async for change in changes:
                if not isinstance(change, Change):
                    self._caught_up.set()
                elif change.value is None:
                    self._deleted.pop(change.key, None)
                    self._remove(change.key)
                else:
                    self.apply(Entry(change.key, change.value, change.revision))

    # --- what is told -------------------------------------------------------------------------------------------------

    def apply(self, entry: Entry[VideoRecord]) -> None:
        """Take in a record, from the watch or an own write; one older than what is known changes nothing."""
        known = self._entries.get(entry.key)
        if entry.key in self._deleted or (known is not None and known.revision >= entry.revision):
            return
        if known is not None:
            self._counts[known.value.state] -= 1
        else:
            insort(self._order, _place(entry.value))
        self._entries[entry.key] = entry
        self._counts[entry.value.state] += 1
        if entry.value.state.terminal:
            self._progress.pop(entry.key, None)
        self._evict()
        self._wake(entry.key)

    def forget(self, job_id: str) -> None:
        """This gateway has deleted the record: what the watch still says of its past counts no more."""
        if job_id in self._entries:
            self._deleted[job_id] = None
            if len(self._deleted) > _KEPT_DELETIONS:
                self._deleted.popitem(last=False)
            self._remove(job_id)

    def progressed(self, progress: VideoProgress) -> None:
        """Take in an event of the scheduler. Only for jobs that are under way: what has ended has its record."""
        known = self._entries.get(progress.job_id)
        if known is None or known.value.state.terminal or progress.state.terminal:
            return
        self._progress[progress.job_id] = progress
        self._wake(progress.job_id)

    # --- what is asked ------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[VideoState, int]:
        """How many videos are in each state."""
        return {state: self._counts[state] for state in VideoState}

    def snapshot(self, job_id: str) -> Snapshot | None:
        entry = self._entries.get(job_id)
        return None if entry is None else self.with_progress(entry.value)

    def with_progress(self, record: VideoRecord) -> Snapshot:
        """``record`` with the progress known of it.

        Progress and records come by separate ways, so progress may be of the state before or after the record's: then
        only its step is told, which a job keeps when it goes back to the queue, up to its last checkpoint. States are
        the record's alone, and so never seem to go back.
        """
        progress = self._progress.get(record.job_id)
        if progress is None or record.state.terminal:
            return Snapshot(record, None)
        if progress.state is not record.state:
            progress = VideoProgress(job_id=record.job_id, state=record.state, step=progress.step, steps=progress.steps)
        return Snapshot(record, progress)

    def place(self, job_id: str) -> Place | None:
        entry = self._entries.get(job_id)
        return None if entry is None else _place(entry.value)

    def page(self, after: Place | None, limit: int, newest_first: bool) -> Page:
        """At most ``limit`` records in order of creation, those behind ``after``."""
        if newest_first:
            end = len(self._order) if after is None else bisect_left(self._order, after)
            places = self._order[max(0, end - limit) : end][::-1]
            has_more = end > limit
        else:
            start = 0 if after is None else bisect_right(self._order, after)
            places = self._order[start : start + limit]
            has_more = start + limit < len(self._order)
        return Page([self._entries[job_id].value for _, job_id in places], has_more)

    @contextlib.contextmanager
    def listening(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something about the video has changed. The listener clears it."""
        changed = asyncio.Event()
        self._listeners.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            listeners = self._listeners[job_id]
            listeners.discard(changed)
            if not listeners:
                del self._listeners[job_id]

    @property
    def listeners(self) -> int:
        return sum(map(len, self._listeners.values()))

    def wake_all(self) -> None:
        """Set every listener's event, so that each looks around."""
        for job_id in self._listeners:
            self._wake(job_id)

    # --- within -------------------------------------------------------------------------------------------------------

    def _wake(self, job_id: str) -> None:
        for changed in self._listeners.get(job_id, ()):
            changed.set()

    def _remove(self, job_id: str) -> None:
        entry = self._entries.pop(job_id, None)
        if entry is not None:
            del self._order[bisect_left(self._order, _place(entry.value))]
            self._counts[entry.value.state] -= 1
        self._progress.pop(job_id, None)
        self._wake(job_id)

    def _evict(self) -> None:
        if len(self._entries) <= self._capacity:
            return
        for _, job_id in self._order:
            if self._entries[job_id].value.state.terminal:
                self._remove(job_id)
                return


def _place(record: VideoRecord) -> Place:
    return record.created_at_s, record.job_id
