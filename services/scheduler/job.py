"""Carries out the policy's decisions for one job, in order: moves its record and tells the workers."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from common.bus.errors import BusError, NobodyThere, ObjectMissing, RemoteFailure
from common.bus.port import Bus
from common.messages.failures import Failure, Stage
from common.messages.subjects import VIDEO_FILES, VIDEO_TIMELINES
from common.messages.tensors import TensorRef
from common.messages.video import (
    Checkpoint,
    DecodeVideo,
    EncodePrompt,
    Lease,
    PromptEncoded,
    StepFinished,
    TimelineSpan,
    VideoFile,
    VideoRecord,
    VideoState,
    VideoTimeline,
)
from common.policies.video import decisions as decide
from common.policies.video import events as event
from services.scheduler.checkpoints import Checkpoints
from services.scheduler.records import JobGone, RecordKeeper
from services.scheduler.workers import Workers

log = structlog.get_logger()

CHANGE_PAUSE_S = 0.2


class VideoJob:
    """One admitted job.

    Decisions are queued and carried out one after the other by ``run``; what comes of them goes to ``tell``, as
    events for the policy. ``changed`` is called whenever the record has moved. ``step`` is how far the job has come,
    and ``checkpoint_step`` counts the steps that no loss of a worker can cost any more.
    """

    def __init__(
        self,
        bus: Bus,
        record: VideoRecord,
        revision: int,
        checkpoints: Checkpoints,
        workers: Workers,
        tell: Callable[[event.Event], None],
        changed: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._keeper = RecordKeeper(bus, record, revision)
        self._checkpoints = checkpoints
        self._workers = workers
        self._tell = tell
        self._changed = changed
        self._decisions: asyncio.Queue[decide.Decision] = asyncio.Queue()
        self._encoder = ""
        self._encoded: dict[int, PromptEncoded] = {}
        self._encoding: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._starting = False
        self._running = False
        self._leased = record.attempt > 0
        self._on_slot: dict[int, str] = {}
        self.attempt = 0
        self.step = 0
        self.checkpoint_step = 0
        self.latents: dict[int, TensorRef] = {}
        self.files: dict[int, VideoFile] = {}
        self.failure: Failure | None = None
        self.spans: list[TimelineSpan] = []

    @property
    def record(self) -> VideoRecord:
        return self._keeper.record

    @property
    def was_under_way(self) -> bool:
        """Whether steps of it may have been done already, and none is being done now."""
        return self._leased and not self._running

    def recalled(self, step: int) -> bool:
        """A checkpoint of ``step`` steps was found; whether that is news."""
        if not self.was_under_way or self.checkpoint_step:
            return False
        self.step = self.checkpoint_step = step
        return True

    def submit(self, decision: decide.Decision) -> None:
        """Queue a decision; the queue is bounded by the policy, which decides a handful per attempt."""
        self._decisions.put_nowait(decision)

    async def run(self) -> None:
        """Carry out decisions until one ends the job, or until somebody else has ended it."""
        try:
            while not self.record.state.terminal:
                await self._carry_out(await self._decisions.get())
                self._changed()
        except JobGone as gone:
            log.info("job ended elsewhere", job=self.record.job_id, state=str(gone))
            self._tell(event.JobCancelled(self.record.job_id))
        finally:
            for task in (self._encoding, self._telling):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

    async def _carry_out(self, decision: decide.Decision) -> None:
        try:
            await self._stop_telling(decision)
            match decision:
                case decide.StartEncoding():
                    await self._start_encoding(decision)
                case decide.GrantLease():
                    await self._grant_lease(decision)
                case decide.ParkJob():
                    self._telling = asyncio.create_task(self._park(decision), name="park")
                case decide.StartDecoding():
                    await self._start_decoding(decision)
                case decide.RequeueJob(reason=reason):
                    log.warning("attempt lost, the job waits again", job=self.record.job_id, reason=reason)
                    self._running = False
                    self.step = self.checkpoint_step
                    await _insist(lambda: self._keeper.move(VideoState.QUEUED, time.time()))
                case decide.CompleteJob():
                    await _insist(self._complete)
                case decide.FailJob(reason=reason):
                    await _insist(lambda: self._fail(reason))
        except BusError as error:
            self._failed(str(error), retryable=True)

    async def _stop_telling(self, decision: decide.Decision) -> None:
        """Whatever is decided now takes the place of a lease that its members have not all heard of.

        Only a start must have been heard by all before it can be changed.
        """
        if self._telling is None:
            return
        if self._starting and isinstance(decision, decide.GrantLease | decide.ParkJob):
            await self._telling
        self._telling.cancel()
        self._telling = None

    async def _start_encoding(self, decision: decide.StartEncoding) -> None:
        self.attempt = decision.attempt
        self._encoder = decision.encoder
        # Steps done before stay: those that a checkpoint does not save are replaced when they are done again.
        self.spans[:] = [span for span in self.spans if span.phase == "step"]
        await self._keeper.move(VideoState.ENCODING, time.time())
        self._encoding = asyncio.create_task(self._encode(decision), name=f"encode-{decision.job_id}")

    async def _encode(self, decision: decide.StartEncoding) -> None:
        try:
            encoded = await self._workers.encode(self._prompt(), decision.encoder)
        except RemoteFailure as refusal:
            self.failure = refusal.failure
            self._failed(refusal.failure.message, refusal.failure.retryable, decision.attempt)
            return
        except BusError as error:
            self._failed(f"{decision.encoder}: {error}", True, decision.attempt)
            return
        self._encoded[decision.attempt] = encoded
        self.spans.append(
            TimelineSpan(
                instance=decision.encoder,
                slot=None,
                phase="encode",
                step=None,
                degree_of_parallelism=1,
                started_at_s=encoded.started_at_s,
                ended_at_s=encoded.ended_at_s,
            )
        )
        self._tell(event.PromptEncoded(decision.job_id, decision.attempt))

    def _prompt(self) -> EncodePrompt:
        request = self.record.request
        return EncodePrompt(job_id=self.record.job_id, prompt=request.caption, negative_prompt=request.negative_prompt)

    async def _grant_lease(self, decision: decide.GrantLease) -> None:
        """Start the job on its members; or, where it runs already, have its lease changed.

        The members are told beside what is decided next, which may overtake it: one that is busy holds nobody up.
        """
        self._on_slot |= zip(decision.slots, decision.members, strict=True)
        self._starting = not self._running
        if self._running:
            self._telling = asyncio.create_task(self._change_lease(self._lease(decision)), name="change-lease")
            return
        # Embeddings are fetched once; a job that was parked has its prompt encoded again, which is soon done.
        encoded = self._encoded.pop(self.attempt, None) or await self._workers.encode(self._prompt(), self._encoder)
        resume = await self._resume_point(decision.leader)
        await self._keeper.move(VideoState.DENOISING, time.time())
        start = {"text": encoded.text, "negative": encoded.negative, "resume": resume}
        lease = self._lease(decision).model_copy(update=start)
        self._running = True
        self._telling = asyncio.create_task(self._start_lease(lease, self.attempt), name="start-lease")

    def _lease(self, decision: decide.GrantLease) -> Lease:
        """The lease as one that changes another; one that starts a job has more."""
        return Lease(
            job_id=decision.job_id,
            epoch=decision.epoch,
            members=decision.members,
            leader=decision.leader,
            request=self.record.request,
            slots=decision.slots,
            meeting=self._workers.meetings.get(decision.leader, ""),
            from_step=decision.from_step,
        )

    async def _start_lease(self, lease: Lease, attempt: int) -> None:
        try:
            await self._workers.grant(lease)
        except BusError as error:
            self._failed(str(error), True, attempt)

    async def _change_lease(self, lease: Lease) -> None:
        await self._tell_until_heard("lease not changed", lease.epoch, lambda: self._workers.grant(lease))

    async def _park(self, decision: decide.ParkJob) -> None:
        await self._tell_until_heard("not parked", decision.epoch, lambda: self._workers.park(decision))

    async def _tell_until_heard(self, otherwise: str, epoch: int, tell: Callable[[], Awaitable[None]]) -> None:
        """Tell the members until all have heard. The job goes on meanwhile, and if it comes to nothing, as it was."""
        while True:
            try:
                await tell()
                return
            except (NobodyThere, RemoteFailure) as error:
                # One is gone, which the policy has been told; or has seen something newer, and so will the policy.
                log.warning(otherwise, job=self.record.job_id, epoch=epoch, reason=str(error))
                return
            except BusError as error:
                log.warning(f"{otherwise} yet", job=self.record.job_id, epoch=epoch, reason=str(error))
            await asyncio.sleep(CHANGE_PAUSE_S)

    async def _resume_point(self, leader: str) -> Checkpoint | None:
        """Where the job goes on; nobody is asked about one that was never under way.

        What those who had it before keep of it for a few seconds is as good as a checkpoint, and newer.
        """
        job_id, resume = self.record.job_id, None
        if self._leased:
            resume = await self._workers.kept_latent(job_id, self.checkpoint_step, leader)
            resume = resume or await self._checkpoints.newest(job_id)
        self._leased = True
        self.step = self.checkpoint_step = resume.step if resume is not None else 0
        return resume

    def step_done(self, report: StepFinished) -> None:
        """Take a step into the timeline, in place of the same and later ones of what was lost."""
        self.step = max(report.step, self.checkpoint_step)
        self.spans[:] = [known for known in self.spans if known.step is None or known.step < report.step]
        self.spans += [
            TimelineSpan(
                instance=self._on_slot.get(slot, report.instance),
                slot=slot,
                phase="step",
                step=report.step,
                degree_of_parallelism=report.degree_of_parallelism,
                started_at_s=report.started_at_s,
                ended_at_s=report.ended_at_s,
            )
            for slot in report.slots
        ]

    def parked(self, step: int) -> None:
        """The latent after ``step`` lies in the cache store, and nobody works on the job."""
        self.step = self.checkpoint_step = step
        self._running = False

    async def _start_decoding(self, decision: decide.StartDecoding) -> None:
        await self._keeper.move(VideoState.DECODING, time.time())
        # A worker that is quick has decoded before its answer is here.
        self._changed()
        work = DecodeVideo(
            job_id=decision.job_id,
            epoch=decision.epoch,
            request=self.record.request,
            latent=self.latents[decision.epoch],
            # One name for each epoch: a worker that was given up too early cannot overwrite its successor's file.
            object_name=f"{decision.job_id}/{decision.epoch}.mp4",
        )
        await self._workers.decode(work, decision.instance)

    async def _complete(self) -> None:
        timeline = VideoTimeline(job_id=self.record.job_id, spans=tuple(self.spans))
        await self._bus.put(VIDEO_TIMELINES, timeline.job_id, timeline)
        file = self.files[max(self.files)]
        try:
            await self._keeper.move(VideoState.COMPLETED, time.time(), file=file)
        except JobGone:
            # Cancelled or deleted in the last moment: nobody will ask for what was made.
            await self._bus.delete(VIDEO_TIMELINES, timeline.job_id)
            with contextlib.suppress(ObjectMissing):
                await self._bus.delete_object(VIDEO_FILES, file.object_name)
            raise

    async def _fail(self, reason: str) -> None:
        failure = self.failure or Failure(stage=Stage.SCHEDULER, code="attempts_exhausted", message=reason)
        await self._keeper.move(VideoState.FAILED, time.time(), failure=failure)

    def _failed(self, reason: str, retryable: bool, attempt: int | None = None) -> None:
        self._tell(event.AttemptFailed(self.record.job_id, attempt or self.attempt, reason, retryable))


async def _insist(write: Callable[[], Awaitable[None]]) -> None:
    """Repeat a write that must not be lost until the broker has taken it."""
    pause_s = 0.1
    while True:
        try:
            return await write()
        except BusError as error:
            log.warning("record not written, trying again", reason=str(error), pause_s=pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
