"""The scheduler's hold on one job record: every move is a compare-and-set, and a terminal state is never left."""

from common.bus.errors import KeyMissing, WrongRevision
from common.bus.port import Bus
from common.messages.failures import Failure
from common.messages.subjects import VIDEO_RECORDS
from common.messages.video import VideoFile, VideoRecord, VideoState


class JobGone(Exception):
    """The record was cancelled, ended or deleted by somebody else."""


class RecordKeeper:
    """Writes one job's record. ``record`` is the newest known state of it."""

    def __init__(self, bus: Bus, record: VideoRecord, revision: int) -> None:
        self._bus = bus
        self.record = record
        self._revision = revision

    async def move(
        self, state: VideoState, now_s: float, *, file: VideoFile | None = None, failure: Failure | None = None
    ) -> None:
        """Move the job to ``state``.

        Raises:
            JobGone: somebody else has ended it; nothing was written.
            BusError: the broker did not take the write in time.
        """
        while True:
            if self.record.state.terminal:
                raise JobGone(self.record.state)
            if self.record.state is state:
                return
            moved = self.record.moved(state, now_s, file=file, failure=failure)
            try:
                self._revision = await self._bus.replace(VIDEO_RECORDS, moved.job_id, moved, self._revision)
            except WrongRevision:
                await self._reload()
                continue
            self.record = moved
            return

    async def _reload(self) -> None:
        try:
            entry = await self._bus.get(VIDEO_RECORDS, self.record.job_id)
        except KeyMissing:
            raise JobGone("deleted") from None
        self.record = entry.value
        self._revision = entry.revision
