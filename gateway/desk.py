"""Creates, cancels and deletes video jobs. Each write is a compare-and-set, so any number of gateways may do so."""

import asyncio
import contextlib
import re
import secrets
import time

import structlog

from common.bus.errors import BadAddress, BusError, KeyMissing, ObjectMissing, QueueFull, WrongRevision
from common.bus.port import Bus, Entry
from common.messages.subjects import VIDEO_FILES, VIDEO_JOBS, VIDEO_RECORDS, VIDEO_TIMELINES
from common.messages.video import VideoQueued, VideoRecord, VideoRequest, VideoState, VideoTimeline
from gateway.errors import DO_NOT_RETRY, ApiError, video_not_found
from gateway.ledger import Place, VideoLedger

log = structlog.get_logger()

_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_OWN_ID = re.compile(r"video_([0-9a-f]{12})[0-9a-f]{20}")
# The client waits meanwhile, and most often the broker is away when this is needed.
_TAKE_BACK_DEADLINE_S = 1.0


def new_video_id(now_ms: int) -> str:
    """An id nobody can guess. Its first part is the time of creation, so that a deleted video's id still has a place in
    the order of the others (see ``place_of``)."""
    return f"video_{now_ms:012x}{secrets.token_hex(10)}"


def place_of(video_id: str) -> Place | None:
    """Where a video made by a gateway stands, or stood, in the order of creation."""
    parsed = _OWN_ID.fullmatch(video_id)
    return (int(parsed[1], 16) / 1000, video_id) if parsed else None


class VideoDesk:
    """The life of a job as far as clients decide it. ``retry_after_s`` is what they are told to wait."""

    def __init__(self, bus: Bus, ledger: VideoLedger, deadline_s: float, retry_after_s: int) -> None:
        self._bus = bus
        self._ledger = ledger
        self._deadline_s = deadline_s
        self._retry_after_s = retry_after_s
        self._latest_ms = 0

    async def find(self, video_id: str) -> Entry[VideoRecord]:
        """The record as the bucket has it now.

        Raises:
            ApiError: 404, there is none.
        """
        if not _ID.fullmatch(video_id):
            raise video_not_found(video_id)
        try:
            entry = await self._bus.get(VIDEO_RECORDS, video_id, deadline_s=self._deadline_s)
        except (KeyMissing, BadAddress) as error:
            raise video_not_found(video_id) from error
        return entry

    async def create(self, request: VideoRequest) -> VideoRecord:
        """Store the record, then the job. Both are stored when this returns; neither is when it raises, as far as the
        broker could be told.

        Raises:
            ApiError: 429, the queue is full.
        """
        # No two at the same time, so that the order of creation is the order of the list.
        now_ms = self._latest_ms = max(int(time.time() * 1000), self._latest_ms + 1)
        record = VideoRecord(
            job_id=new_video_id(now_ms),
            state=VideoState.QUEUED,
            request=request,
            created_at_s=now_ms / 1000,
            updated_at_s=now_ms / 1000,
        )
        try:
            revision = await self._bus.create(VIDEO_RECORDS, record.job_id, record, deadline_s=self._deadline_s)
            queued = VideoQueued(job_id=record.job_id)
            await self._bus.enqueue(VIDEO_JOBS, queued, record.job_id, deadline_s=self._deadline_s)
        except QueueFull as error:
            await self._take_back(record.job_id)
            raise ApiError(
                429,
                f"{VIDEO_JOBS.max_messages} videos wait already. Try again in {self._retry_after_s} s or later.",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s)},
            ) from error
        except BusError:
            await self._take_back(record.job_id)
            raise
        self._ledger.apply(Entry(record.job_id, record, revision))
        log.info("video created", job=record.job_id, model=request.model)
        return record

    async def _take_back(self, job_id: str) -> None:
        """Undo a create that was not heard of in full. What cannot be taken back, the scheduler adopts."""
        try:
            await self._bus.remove(VIDEO_JOBS, job_id, deadline_s=_TAKE_BACK_DEADLINE_S)
            await self._bus.delete(VIDEO_RECORDS, job_id, deadline_s=_TAKE_BACK_DEADLINE_S)
        except BusError as error:
            log.warning("half a create may be left", job=job_id, reason=str(error))

    async def cancel(self, video_id: str) -> VideoRecord:
        """End the job, whatever it is at; once cancelled, cancelling again changes nothing.

        Raises:
            ApiError: 404 there is none; 409 it has ended otherwise.
        """
        record = await self._end(video_id)
        if record.state is not VideoState.CANCELLED:
            raise ApiError(
                409,
                f"Video {video_id} is {record.state} already and cannot be cancelled. DELETE removes it.",
                code=f"video_{record.state}",
                param="video_id",
                headers=DO_NOT_RETRY,
            )
        return record

    async def delete(self, video_id: str) -> None:
        """Cancel the job if it has not ended, then remove its file, its timeline and, last, its record.

        Raises:
            ApiError: 404 there is none.
        """
        record = await self._end(video_id)
        if record.file is not None:
            with contextlib.suppress(ObjectMissing):
                await self._bus.delete_object(VIDEO_FILES, record.file.object_name, deadline_s=self._deadline_s)
        await self._bus.delete(VIDEO_TIMELINES, video_id, deadline_s=self._deadline_s)
        # Of several who delete at once, one succeeds; the others learn that there is none any more.
        entry = await self.find(video_id)
        try:
            await self._bus.delete(VIDEO_RECORDS, video_id, entry.revision, deadline_s=self._deadline_s)
        except WrongRevision as error:
            raise video_not_found(video_id) from error
        self._ledger.forget(video_id)
        log.info("video deleted", job=video_id)

    async def timeline(self, record: VideoRecord) -> VideoTimeline:
        """Which slot did what.

        Raises:
            ApiError: 409 the video has not ended; 404 none was kept.
        """
        try:
            entry = await self._bus.get(VIDEO_TIMELINES, record.job_id, deadline_s=self._deadline_s)
        except KeyMissing as error:
            if record.state.terminal:
                raise ApiError(
                    404, f"No timeline was kept of video {record.job_id}, which is {record.state}.", code="no_timeline"
                ) from error
            raise ApiError(
                409,
                f"Video {record.job_id} is {record.state}; its timeline is there once it has ended. "
                f"GET /v1/videos/{record.job_id}/events tells when.",
                code="video_not_ready",
                param="video_id",
                headers=DO_NOT_RETRY,
            ) from error
        return entry.value

    async def _end(self, video_id: str) -> VideoRecord:
        """The record in a terminal state: cancelled by this call, unless it had ended before."""
        async with asyncio.timeout(4 * self._deadline_s):
            while True:
                entry = await self.find(video_id)
                if entry.value.state.terminal:
                    return entry.value
                cancelled = entry.value.moved(VideoState.CANCELLED, time.time())
                try:
                    revision = await self._bus.replace(
                        VIDEO_RECORDS, video_id, cancelled, entry.revision, deadline_s=self._deadline_s
                    )
                except WrongRevision:
                    continue
                break
        self._ledger.apply(Entry(video_id, cancelled, revision))
        log.info("video cancelled", job=video_id, was=entry.value.state)
        # The scheduler has heard of it through the bucket; a job still queued is only thrown away sooner like this.
        with contextlib.suppress(BusError):
            await self._bus.remove(VIDEO_JOBS, video_id, deadline_s=self._deadline_s)
        return cancelled
