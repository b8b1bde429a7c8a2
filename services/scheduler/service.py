"""The scheduler process: turns messages into events for the policy, and its decisions into messages.

It holds no rule of its own: who gets which slot is decided in ``common.policies``.
"""

import asyncio
import contextlib
import time

import structlog

from common.bus.errors import BusError, KeyExists, KeyMissing, WrongRevision
from common.bus.nats_bus import NatsBus
from common.bus.port import Bus, Change
from common.messages.cluster import Member, SchedulerLife, Service
from common.messages.subjects import (
    SCHEDULER_LIVES,
    VIDEO_BUCKETS,
    VIDEO_JOBS,
    VIDEO_OBJECTS,
    VIDEO_PROGRESS,
    VIDEO_QUEUES,
    VIDEO_RECORDS,
)
from common.messages.video import VideoRecord, VideoState
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.policy import Policy
from common.policies.video.state import Phase
from common.runtime.membership import (
    MemberChange,
    MemberDraining,
    MemberJoined,
    MemberLost,
    MembershipView,
    Registration,
)
from services.scheduler.chat import ChatRouter
from services.scheduler.checkpoints import Checkpoints
from services.scheduler.choices import choose_flips, choose_policy, choose_rule, log_rule, open_record
from services.scheduler.config import SchedulerSettings
from services.scheduler.flips import Flips
from services.scheduler.job import VideoJob
from services.scheduler.progress import ProgressReporter
from services.scheduler.record import EventRecord
from services.scheduler.reports import WorkerReports
from services.scheduler.workers import Workers

log = structlog.get_logger()

TAKE_DEADLINE_S = 2.0
ORPHAN_CHECK_S = 10.0
EPOCHS_PER_LIFE = 1 << 32
# Steps of so long are told together: each report wakes broker, gateway and client, on a CPU at the steps' cost.
STEPS_TOGETHER_S = 0.1


class Scheduler:
    """Admits jobs, hears the workers, and drives one policy. ``record``: where its events go, if anywhere."""

    def __init__(
        self,
        bus: Bus,
        policy: Policy,
        first_epoch: int,
        settings: SchedulerSettings,
        record: EventRecord | None = None,
    ) -> None:
        self._bus = bus
        self._policy = policy
        self._first_epoch = first_epoch
        self._settings = settings
        self._record = record
        self._jobs: dict[str, VideoJob] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._unfinished: dict[str, VideoRecord] = {}
        self._view = MembershipView(bus, settings.member_timeout_s, self._member_changed)
        self._workers = Workers(bus, self._view.doubt)
        rule = choose_rule(settings)
        self._chats = ChatRouter(bus, first_epoch, self._view.doubt, rule, settings.dispatch != "scheduler")
        self._flips = Flips(bus, self._chats, self._view, choose_flips(settings, rule.costs))
        self._checkpoints = Checkpoints(bus, self._cache_store_expected)
        self._present: dict[str, str] = {}
        self._records_read = asyncio.Event()
        self._room = asyncio.Event()
        self._progress = ProgressReporter(policy)
        self._dirty = asyncio.Event()
        self._steps_due: asyncio.TimerHandle | None = None

    async def run(self, registration: Registration, stop: asyncio.Event) -> None:
        """Serve until ``stop``; then let what runs come to its end, within the drain time."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            reports = await self._reports(tasks).listen()
            loops = [
                tasks.create_task(self._watch_records(), name="watch-records"),
                tasks.create_task(self._publish_progress(), name="publish-progress"),
            ]
            async with self._view.running(), self._chats.running(), self._flips.running():
                async with asyncio.timeout(30.0):
                    await self._records_read.wait()
                await self._recover()
                intake = [
                    tasks.create_task(self._take_jobs(), name="take-jobs"),
                    tasks.create_task(self._adopt_orphans(), name="adopt-orphans"),
                ]
                await registration.ready()
                await stop.wait()
                self._tell(event.DrainRequested())
                await registration.draining()
                for task in intake:
                    task.cancel()
                await self._drain()
            for task in [*loops, *self._running.values()]:
                task.cancel()
            for subscription in reports:
                await subscription.stop()

    def _reports(self, tasks: asyncio.TaskGroup) -> WorkerReports:
        return WorkerReports(
            self._bus, self._jobs, self._policy.state, self._workers, self._progress, self._tell, tasks.create_task
        )

    # --- the policy -----------------------------------------------------------------------------------------------

    def _tell(self, happened: event.Event) -> None:
        """Hand one event to the policy and pass its decisions on."""
        now_s = time.time()
        if self._record is not None:
            self._record.write(now_s, happened)
        for decision in self._policy.handle(happened, now_s):
            log.info("decided", decision=type(decision).__name__, job=decision.job_id, reason=decision.reason)
            match decision:
                case decide.RevokeLease() | decide.CancelDecoding():
                    # Not queued behind the job's other decisions: cancel means now.
                    self._tasks.create_task(self._workers.withdraw(decision))
                case _:
                    self._jobs[decision.job_id].submit(decision)
        if isinstance(happened, event.JobCancelled):
            task = self._running.get(happened.job_id)
            if task is not None:
                if task is not asyncio.current_task():
                    task.cancel()
                self._tasks.create_task(self._checkpoints.drop(happened.job_id))
        if len(self._policy.state.jobs) < self._settings.max_admitted:
            self._room.set()
        if not isinstance(happened, event.StepFinished | event.CheckpointStored):
            self._dirty.set()
        elif self._steps_due is None:
            self._steps_due = asyncio.get_running_loop().call_later(STEPS_TOGETHER_S, self._tell_steps)

    def _tell_steps(self) -> None:
        self._steps_due = None
        self._dirty.set()

    # --- jobs coming in -------------------------------------------------------------------------------------------

    async def _take_jobs(self) -> None:
        while True:
            if len(self._policy.state.jobs) >= self._settings.max_admitted:
                self._room.clear()
                await self._room.wait()
            try:
                taken = await self._bus.take(VIDEO_JOBS, deadline_s=TAKE_DEADLINE_S)
                if taken is None:
                    continue
                await self._admit(taken.body.job_id)
                await taken.ack()
            except BusError as error:
                log.warning("cannot take jobs, trying again", reason=str(error))
                await asyncio.sleep(0.5)

    async def _admit(self, job_id: str) -> None:
        """Make the job known to the policy, unless it is already, or has ended."""
        if job_id in self._jobs:
            return
        try:
            entry = await self._bus.get(VIDEO_RECORDS, job_id)
        except KeyMissing:
            return
        if entry.value.state.terminal:
            return
        record, revision = entry.value, entry.revision
        checkpoint_step = await self._checkpoints.newest_step(job_id) if record.attempt else 0
        if record.state is not VideoState.QUEUED:
            try:
                record = record.moved(VideoState.QUEUED, time.time())
                revision = await self._bus.replace(VIDEO_RECORDS, job_id, record, revision)
            except WrongRevision:
                return
        if job_id in self._jobs:
            return
        job = VideoJob(self._bus, record, revision, self._checkpoints, self._workers, self._tell, self._dirty.set)
        job.step = job.checkpoint_step = checkpoint_step
        self._jobs[job_id] = job
        self._running[job_id] = self._tasks.create_task(self._run_job(job), name=job_id)
        request = record.request
        self._tell(
            event.JobArrived(
                job_id,
                record.created_at_s,
                request.width,
                request.height,
                request.frames,
                request.steps,
                record.attempt,
                request.priority,
                request.deadline_s,
                checkpoint_step,
            )
        )

    async def _run_job(self, job: VideoJob) -> None:
        try:
            await job.run()
        finally:
            job_id = job.record.job_id
            self._progress.ended(job.record)
            self._dirty.set()
            self._jobs.pop(job_id, None)
            self._running.pop(job_id, None)
            if job.record.state.terminal:
                self._tasks.create_task(self._checkpoints.drop(job_id))

    async def _recover(self) -> None:
        """Take over what a former scheduler left unfinished, oldest first, the waiting ones as far as there is room.

        Those may be in the queue as well, even ahead of their turn: what the former one took and did not acknowledge
        comes again only after a while. A job that is known already is acknowledged there and no more.
        """
        for record in sorted(self._unfinished.values(), key=lambda record: record.created_at_s):
            if record.state is not VideoState.QUEUED or len(self._policy.state.jobs) < self._settings.max_admitted:
                log.info("taking over", job=record.job_id, state=record.state)
                await self._admit(record.job_id)

    async def _look_up_steps(self) -> None:
        """Find out how far those jobs have come that were admitted before their checkpoints could be asked for."""
        for job_id, job in list(self._jobs.items()):
            if job.was_under_way and not job.checkpoint_step:
                step = await self._checkpoints.newest_step(job_id)
                if step and job.recalled(step):
                    self._tell(event.CheckpointStored(job_id, step))

    async def _adopt_orphans(self) -> None:
        """Admit jobs whose record was stored but whose place in the queue was lost with their gateway."""
        while True:
            await asyncio.sleep(ORPHAN_CHECK_S)
            horizon_s = time.time() - ORPHAN_CHECK_S
            for record in list(self._unfinished.values()):
                if record.job_id in self._jobs or record.updated_at_s > horizon_s:
                    continue
                with contextlib.suppress(BusError):
                    if not await self._bus.queued(VIDEO_JOBS, record.job_id):
                        await self._admit(record.job_id)

    async def _watch_records(self) -> None:
        async for change in self._bus.watch(VIDEO_RECORDS):
            if not isinstance(change, Change):
                self._records_read.set()
                continue
            if change.value is not None and not change.value.state.terminal:
                self._unfinished[change.key] = change.value
                continue
            self._unfinished.pop(change.key, None)
            # Completed and failed are this scheduler's own writes; anything else was somebody's wish.
            if change.value is None or change.value.state is VideoState.CANCELLED:
                self._tell(event.JobCancelled(change.key))

    async def _drain(self) -> None:
        busy = (Phase.DENOISING, Phase.DENOISED, Phase.DECODING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                while tasks := [
                    self._running[job.job_id] for job in self._policy.state.jobs.values() if job.phase in busy
                ]:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    # --- workers --------------------------------------------------------------------------------------------------

    def _member_changed(self, change: MemberChange) -> None:
        member = change.member
        if isinstance(change, MemberLost):
            self._present.pop(member.instance, None)
        else:
            self._present[member.instance] = member.incarnation
        self._chats.member_changed(change)
        match change:
            case MemberJoined():
                if member.service is Service.CACHE_STORE:
                    self._tasks.create_task(self._look_up_steps())
                elif member.service in (Service.ENCODER, Service.DIT, Service.VAE):
                    log.info("worker joined", instance=member.instance, slot=member.slot)
                    self._workers.meetings[member.instance] = member.meeting
                    self._tasks.create_task(self._welcome(member))
            case MemberDraining():
                self._tell(event.WorkerDraining(member.instance))
            case MemberLost(reason=reason):
                log.info("member lost", instance=member.instance, reason=reason)
                self._workers.lost(member.instance)
                if member.service is Service.DIT:
                    # Should it be alive after all, it lets go of what others get now, and its group hears that.
                    self._tasks.create_task(self._workers.revoke_lease(member.instance, None, self._newest_epoch()))
                self._tell(event.WorkerLost(member.instance))

    def _newest_epoch(self) -> int:
        return max((job.epoch for job in self._policy.state.jobs.values()), default=self._first_epoch - 1)

    def _cache_store_expected(self) -> bool:
        return any(member.service is Service.CACHE_STORE for member in self._view.members.values())

    async def _welcome(self, member: Member) -> None:
        """Clear what a former scheduler left running on the worker, then count on it."""
        everything = self._first_epoch - 1
        match member.service:
            case Service.DIT:
                await self._workers.take_back(member.instance, everything)
            case Service.VAE:
                await self._workers.cancel_decoding(member.instance, None, everything)
            case _:
                pass
        if self._present.get(member.instance) == member.incarnation:
            self._tell(event.WorkerJoined(member.instance, member.service, member.slot, member.host))

    # --- progress -------------------------------------------------------------------------------------------------

    async def _publish_progress(self) -> None:
        """Tell who listens what has changed. Changes that come while one is told are told together."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            records = {job_id: job.record for job_id, job in self._jobs.items()}
            steps = {job_id: job.step for job_id, job in self._jobs.items()}
            for progress in self._progress.changes(records, steps):
                with contextlib.suppress(BusError):
                    await self._bus.publish(VIDEO_PROGRESS, progress, progress.job_id)


async def take_first_epoch(bus: Bus) -> int:
    """The first epoch of this scheduler's life: above all that any scheduler before it can have used."""
    while True:
        try:
            await bus.create(SCHEDULER_LIVES, "video", SchedulerLife(number=1))
            return EPOCHS_PER_LIFE
        except KeyExists:
            pass
        entry = await bus.get(SCHEDULER_LIVES, "video")
        life = SchedulerLife(number=entry.value.number + 1)
        with contextlib.suppress(WrongRevision):
            await bus.replace(SCHEDULER_LIVES, "video", life, entry.revision)
            return life.number * EPOCHS_PER_LIFE


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Connect, prepare the durable state, and run the scheduler until ``stop``."""
    # Looked at before anything starts.
    choose_policy(settings, 1)
    choose_rule(settings)
    bus = await NatsBus.connect(settings.nats_url, name=settings.instance_of(Service.SCHEDULER))
    try:
        await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
        with open_record(settings) as record:
            async with Registration(bus, settings, Service.SCHEDULER) as registration:
                first_epoch = await take_first_epoch(bus)
                policy = choose_policy(settings, first_epoch)
                log.info("scheduler starts", policy=policy.name, rib=str(settings.rib), first_epoch=first_epoch)
                log_rule(settings)
                await Scheduler(bus, policy, first_epoch, settings, record).run(registration, stop)
    finally:
        await bus.close()
