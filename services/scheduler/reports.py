"""What workers report of their jobs, turned into events for the policy."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from common.bus.port import Bus, Subscription
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    CHECKPOINT_STORED,
    DECODING_FINISHED,
    DENOISING_FINISHED,
    GROUP_LOST,
    JOB_PARKED,
    PHASE_FAILED,
    STEP_FINISHED,
)
from common.messages.video import (
    CheckpointStored,
    DecodingFinished,
    DenoisingFinished,
    GroupLost,
    JobParked,
    PhaseFailed,
    StepFinished,
    TimelineSpan,
)
from common.policies.video import events as event
from common.policies.video.state import ClusterState, Job, Phase
from services.scheduler.job import VideoJob
from services.scheduler.progress import ProgressReporter
from services.scheduler.workers import Workers

log = structlog.get_logger()

# Where steps of a job's newest run still count: its end is told by a request, which may overtake the last one's event.
_RUN = frozenset((Phase.DENOISING, Phase.PARKED, Phase.DENOISED, Phase.DECODING))


class WorkerReports:
    """Hears the workers. ``jobs`` and ``state`` are the scheduler's and its policy's own, only looked at here.

    ``tell`` hands an event to the policy; ``spawn`` starts a task that the scheduler owns.
    """

    def __init__(
        self,
        bus: Bus,
        jobs: Mapping[str, VideoJob],
        state: ClusterState,
        workers: Workers,
        progress: ProgressReporter,
        tell: Callable[[event.Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._bus = bus
        self._jobs = jobs
        self._state = state
        self._workers = workers
        self._progress = progress
        self._tell = tell
        self._spawn = spawn

    async def listen(self) -> Sequence[Subscription]:
        return (
            await self._bus.serve(DENOISING_FINISHED, self._denoising_finished),
            await self._bus.serve(DECODING_FINISHED, self._decoding_finished),
            await self._bus.serve(PHASE_FAILED, self._phase_failed),
            await self._bus.serve(JOB_PARKED, self._job_parked),
            await self._bus.subscribe(STEP_FINISHED, self._step_finished),
            await self._bus.subscribe(GROUP_LOST, self._group_lost),
            await self._bus.subscribe(CHECKPOINT_STORED, self._checkpoint_stored),
        )

    async def _step_finished(self, report: StepFinished) -> None:
        job = self._jobs.get(report.job_id)
        known = self._under_way(report.job_id, report.epoch)
        if job is None or known is None or known.phase not in _RUN:
            return
        job.step_done(report)
        self._progress.step_took(known, report.degree_of_parallelism, report.ended_at_s - report.started_at_s)
        self._tell(event.StepFinished(report.job_id, report.epoch, report.step, report.next_epoch))

    def _under_way(self, job_id: str, epoch: int) -> Job | None:
        """The job, if ``epoch`` is a lease of its newest run: of an older one nothing matters any more."""
        known = self._state.jobs.get(job_id)
        return known if known is not None and known.first_epoch <= epoch <= known.epoch else None

    async def _group_lost(self, report: GroupLost) -> None:
        """Find out who is dead; what becomes of those who are left, the policy decides when it hears that."""
        if self._under_way(report.job_id, report.epoch) is not None:
            log.warning("group lost", job=report.job_id, told_by=report.instance, reason=report.reason)
            self._spawn(self._workers.look_for_dead(report.members))

    async def _job_parked(self, report: JobParked) -> Acknowledged:
        job = self._jobs.get(report.job_id)
        if job is not None and self._under_way(report.job_id, report.epoch) is not None:
            job.parked(report.step)
            self._tell(event.JobParked(report.job_id, report.epoch, report.step))
        return Acknowledged()

    def _checkpoint_stored(self, report: CheckpointStored) -> None:
        job = self._jobs.get(report.job_id)
        # Of an older run it would say nothing of where this one stands.
        if job is not None and self._under_way(report.job_id, report.epoch) is not None:
            job.checkpoint_step = report.step
            self._tell(event.CheckpointStored(report.job_id, report.step))

    async def _denoising_finished(self, report: DenoisingFinished) -> Acknowledged:
        job = self._jobs.get(report.job_id)
        if job is not None:
            job.latents[report.epoch] = report.latent
            self._tell(event.DenoisingFinished(report.job_id, report.epoch))
        return Acknowledged()

    async def _decoding_finished(self, report: DecodingFinished) -> Acknowledged:
        job = self._jobs.get(report.job_id)
        known = self._state.jobs.get(report.job_id)
        # Of a worker that was given up, nothing counts.
        if job is not None and known is not None and known.epoch == report.epoch:
            job.files[report.epoch] = report.file
            job.spans.append(
                TimelineSpan(
                    instance=report.instance,
                    slot=report.slot,
                    phase="decode",
                    step=None,
                    degree_of_parallelism=1,
                    started_at_s=report.started_at_s,
                    ended_at_s=report.ended_at_s,
                )
            )
            self._progress.decode_took(known, report.ended_at_s - report.started_at_s)
            self._tell(event.DecodingFinished(report.job_id, report.epoch))
        return Acknowledged()

    async def _phase_failed(self, report: PhaseFailed) -> Acknowledged:
        job = self._jobs.get(report.job_id)
        known = self._under_way(report.job_id, report.epoch)
        if job is not None and known is not None and known.phase in (Phase.DENOISING, Phase.DECODING):
            job.failure = report.failure
            reason = f"{report.instance}: {report.failure.message}"
            self._tell(event.AttemptFailed(report.job_id, known.attempt, reason, report.failure.retryable))
        return Acknowledged()
