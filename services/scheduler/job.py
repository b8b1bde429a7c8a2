"""Carries out the policy's decisions for one job, in order: moves its record and tells the workers."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from common.bus.errors import BusError, NobodyThere, ObjectMissing, RemoteFailure
from common.bus.port import Bus
from common.messages.failures import Failure, Stage
from common.messages.subjects import (
    CANCEL_DECODING,
    DECODE_VIDEO,
    ENCODE_PROMPT,
    GRANT_LEASE,
    REVOKE_LEASE,
    VIDEO_FILES,
    VIDEO_TIMELINES,
    Reply,
    Request,
    RequestSubject,
)
from common.messages.tensors import TensorRef
from common.messages.video import (
    CancelDecoding,
    Checkpoint,
    DecodeVideo,
    EncodePrompt,
    Lease,
    PromptEncoded,
    RevokeLease,
    TimelineSpan,
    VideoFile,
    VideoRecord,
    VideoState,
    VideoTimeline,
)
from common.policies import decisions as decide
from common.policies import events as event
from services.scheduler.checkpoints import Checkpoints
from services.scheduler.records import JobGone, RecordKeeper

log = structlog.get_logger()

CONTROL_DEADLINE_S = 5.0
ENCODE_DEADLINE_S = 60.0


class VideoJob:
    """One admitted job.

    Decisions are queued and carried out one after the other by ``run``; what comes of them goes to ``tell``, as
    events for the policy. ``doubt`` is told of a worker that does not answer; ``changed`` is called whenever the record
    has moved. ``checkpoint_step`` counts the steps that no loss of a worker can cost any more.
    """

    def __init__(
        self,
        bus: Bus,
        record: VideoRecord,
        revision: int,
        checkpoints: Checkpoints,
        tell: Callable[[event.Event], None],
        doubt: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._keeper = RecordKeeper(bus, record, revision)
        self._checkpoints = checkpoints
        self._tell = tell
        self._doubt = doubt
        self._changed = changed
        self._decisions: asyncio.Queue[decide.Decision] = asyncio.Queue()
        self._encoded: dict[int, PromptEncoded] = {}
        self._encoding: asyncio.Task[None] | None = None
        self._leased = record.attempt > 0
        self.attempt = 0
        self.checkpoint_step = 0
        self.latents: dict[int, TensorRef] = {}
        self.files: dict[int, VideoFile] = {}
        self.failure: Failure | None = None
        self.spans: list[TimelineSpan] = []

    @property
    def record(self) -> VideoRecord:
        return self._keeper.record

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
            if self._encoding is not None:
                self._encoding.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._encoding

    async def _carry_out(self, decision: decide.Decision) -> None:
        try:
            match decision:
                case decide.StartEncoding():
                    await self._start_encoding(decision)
                case decide.GrantLease():
                    await self._grant_lease(decision)
                case decide.StartDecoding():
                    await self._start_decoding(decision)
                case decide.RequeueJob(reason=reason):
                    log.warning("attempt lost, the job waits again", job=self.record.job_id, reason=reason)
                    await _insist(lambda: self._keeper.move(VideoState.QUEUED, time.time()))
                case decide.CompleteJob():
                    await _insist(self._complete)
                case decide.FailJob(reason=reason):
                    await _insist(lambda: self._fail(reason))
        except BusError as error:
            self._failed(str(error), retryable=True)

    async def _start_encoding(self, decision: decide.StartEncoding) -> None:
        self.attempt = decision.attempt
        # Steps done before stay: those that a checkpoint does not save are replaced when they are done again.
        self.spans[:] = [span for span in self.spans if span.phase == "step"]
        await self._keeper.move(VideoState.ENCODING, time.time())
        self._encoding = asyncio.create_task(self._encode(decision), name=f"encode-{decision.job_id}")

    async def _encode(self, decision: decide.StartEncoding) -> None:
        request = EncodePrompt(
            job_id=decision.job_id,
            prompt=self.record.request.prompt,
            negative_prompt=self.record.request.negative_prompt,
        )
        try:
            encoded = await self._ask(ENCODE_PROMPT, request, decision.encoder, ENCODE_DEADLINE_S)
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

    async def _grant_lease(self, decision: decide.GrantLease) -> None:
        encoded = self._encoded[self.attempt]
        resume = await self._resume_point()
        await self._keeper.move(VideoState.DENOISING, time.time())
        lease = Lease(
            job_id=decision.job_id,
            epoch=decision.epoch,
            members=decision.members,
            leader=decision.leader,
            request=self.record.request,
            text=encoded.text,
            negative=encoded.negative,
            resume=resume,
        )
        for member in decision.members:
            await self._ask(GRANT_LEASE, lease, member)

    async def _resume_point(self) -> Checkpoint | None:
        """Where the job goes on; nobody is asked about one that was never under way."""
        resume = await self._checkpoints.newest(self.record.job_id) if self._leased else None
        self._leased = True
        self.checkpoint_step = resume.step if resume is not None else 0
        return resume

    def step_done(self, span: TimelineSpan) -> None:
        """Take a step into the timeline, in place of the same and later ones of an attempt that was lost."""
        step = span.step or 0
        self.spans[:] = [*(known for known in self.spans if known.step is None or known.step < step), span]

    async def _start_decoding(self, decision: decide.StartDecoding) -> None:
        await self._keeper.move(VideoState.DECODING, time.time())
        work = DecodeVideo(
            job_id=decision.job_id,
            epoch=decision.epoch,
            request=self.record.request,
            latent=self.latents[decision.epoch],
            # One name for each epoch: a worker that was given up too early cannot overwrite its successor's file.
            object_name=f"{decision.job_id}/{decision.epoch}.mp4",
        )
        await self._ask(DECODE_VIDEO, work, decision.instance)

    async def _ask(
        self,
        subject: RequestSubject[Request, Reply],
        request: Request,
        instance: str,
        deadline_s: float = CONTROL_DEADLINE_S,
    ) -> Reply:
        """Ask a worker. One that is not there is not chosen again before it has given a sign of life."""
        try:
            return await self._bus.request(subject, request, instance, deadline_s=deadline_s)
        except NobodyThere:
            self._doubt(instance)
            raise

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


async def withdraw(bus: Bus, decision: decide.RevokeLease | decide.CancelDecoding) -> None:
    """Tell the workers to let a job go."""
    match decision:
        case decide.RevokeLease(job_id, epoch, members):
            for member in members:
                await revoke_lease(bus, member, job_id, epoch)
        case decide.CancelDecoding(job_id, epoch, instance):
            await cancel_decoding(bus, instance, job_id, epoch)


async def revoke_lease(bus: Bus, instance: str, job_id: str | None, epoch: int) -> None:
    """Have a DiT worker drop the leases of ``job_id`` (None: of any job) up to ``epoch``.

    One that cannot be told is dying; should it live on, the next lease's higher epoch tells it.
    """
    try:
        revoke = RevokeLease(job_id=job_id, epoch=epoch)
        await bus.request(REVOKE_LEASE, revoke, instance, deadline_s=CONTROL_DEADLINE_S)
    except BusError as error:
        log.warning("lease not revoked", instance=instance, job=job_id, reason=str(error))


async def cancel_decoding(bus: Bus, instance: str, job_id: str | None, epoch: int) -> None:
    """Have a VAE worker drop the decoding of ``job_id`` (None: of any job) up to ``epoch``."""
    try:
        cancel = CancelDecoding(job_id=job_id, epoch=epoch)
        await bus.request(CANCEL_DECODING, cancel, instance, deadline_s=CONTROL_DEADLINE_S)
    except BusError as error:
        log.warning("decoding not cancelled", instance=instance, job=job_id, reason=str(error))
