"""DiT workers and a cache store as real processes, forked from one server, with the test as their scheduler."""

import asyncio
import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import torch

from common.bus.errors import KeyMissing
from common.bus.nats_bus import NatsBus
from common.messages.cluster import MemberState
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    CHECKPOINT_STORED,
    DENOISING_FINISHED,
    GROUP_LOST,
    JOB_PARKED,
    MEMBERS,
    PARK_JOB,
    PHASE_FAILED,
    REVOKE_LEASE,
    STEP_FINISHED,
    VIDEO_BUCKETS,
)
from common.messages.video import (
    Checkpoint,
    CheckpointStored,
    DenoisingFinished,
    GroupLost,
    JobParked,
    Lease,
    ParkJob,
    PhaseFailed,
    RevokeLease,
    StepFinished,
    VideoRequest,
)
from common.tensors.ucx import UcxTensors
from compose.launch import ForkLauncher, Launch, Running
from services.scheduler.checkpoints import Checkpoints
from services.scheduler.workers import Workers
from tests.support.nats_server import NatsServer, running_nats_server

WAIT_S = 60.0
_PRELOAD = ("common.runtime.worker", "common.models.opensora.pipeline")


class DenoisingStage:
    """Starts, kills and asks the processes, and hears what they report."""

    def __init__(self, server: NatsServer, bus: NatsBus, tensors: UcxTensors, model: Path, folder: Path) -> None:
        self.bus = bus
        self.tensors = tensors
        self.checkpoints = Checkpoints(bus, lambda: False)
        self.workers = Workers(bus, lambda instance: None)
        self.reports: list[StepFinished] = []
        self.lost: list[GroupLost] = []
        self.parked: list[JobParked] = []
        self.steps: dict[int, list[int]] = defaultdict(list)
        self._reports: dict[int, list[StepFinished]] = defaultdict(list)
        self.stored: dict[str, list[int]] = defaultdict(list)
        self.latents: asyncio.Queue[DenoisingFinished] = asyncio.Queue(100)
        self.failures: list[PhaseFailed] = []
        self._folder = folder
        self._environment = os.environ | {
            "TRIPTYCH_NATS_URL": server.url,
            "TRIPTYCH_VIDEO_MODEL": str(model),
            "TRIPTYCH_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self._launcher = ForkLauncher(self._environment, _PRELOAD, folder / "forkserver.log")
        self._running: dict[str, Running] = {}
        self._epoch = int(time.time() * 1000)
        self._news = asyncio.Event()

    # --- processes ------------------------------------------------------------------------------------------------

    async def start(self, instance: str, **settings: str) -> None:
        """Start a process, unless it runs; it is not waited for."""
        running = self._running.get(instance)
        if running is not None and not running.ended.done():
            return
        service, _, slot = instance.rpartition("-")
        environment = self._environment | {"TRIPTYCH_INSTANCE": instance, "TRIPTYCH_SLOT": slot} | settings
        command = ("python", "-m", f"services.{service}")
        launch = Launch(instance, command, environment, self.log(instance), _PRELOAD)
        self._running[instance] = await self._launcher.launch(launch)

    async def ready(self, *instances: str) -> None:
        """Return once the newest life of each takes work."""
        async with asyncio.timeout(WAIT_S):
            for instance in instances:
                while not await self._is_ready(instance):  # noqa: ASYNC110 - asked once and again, briefly
                    await asyncio.sleep(0.02)

    async def _is_ready(self, instance: str) -> bool:
        with contextlib.suppress(KeyMissing):
            member = (await self.bus.get(MEMBERS, instance)).value
            self.workers.meetings[instance] = member.meeting
            return member.pid == self._running[instance].pid and member.state is MemberState.READY
        return False

    async def kill(self, instance: str) -> None:
        self._running[instance].signal(signal.SIGKILL)
        await asyncio.wait_for(asyncio.shield(self._running[instance].ended), WAIT_S)

    def signal(self, instance: str, number: signal.Signals) -> None:
        self._running[instance].signal(number)

    async def ended(self, instance: str) -> int:
        return await asyncio.wait_for(asyncio.shield(self._running[instance].ended), WAIT_S)

    def log(self, instance: str) -> Path:
        return self._folder / f"{instance}.log"

    # --- the scheduler's part -------------------------------------------------------------------------------------

    async def grant(self, instance: str, request: VideoRequest, job_id: str, resume: Checkpoint | None = None) -> Lease:
        """Have a job denoised by one worker, from the beginning or from ``resume`` on."""
        return await self.start_job((instance,), request, job_id, resume)

    async def start_job(
        self, members: tuple[str, ...], request: VideoRequest, job_id: str, resume: Checkpoint | None = None
    ) -> Lease:
        """Have a job denoised by a group."""
        embeddings = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
        text = self.tensors.export(embeddings, uses=1, lease_s=WAIT_S)
        lease = self._lease(members, request, job_id).model_copy(update={"text": text, "resume": resume})
        await self.workers.grant(lease)
        return lease

    async def change(self, lease: Lease, *members: str) -> Lease:
        """Have a running job go on with other members."""
        newer = self._lease(members, lease.request, lease.job_id)
        await self.workers.grant(newer)
        return newer

    def _lease(self, members: tuple[str, ...], request: VideoRequest, job_id: str) -> Lease:
        self._epoch += 1
        return Lease(
            job_id=job_id,
            epoch=self._epoch,
            members=members,
            leader=members[0],
            request=request,
            slots=tuple(int(instance.rpartition("-")[2]) for instance in members),
            meeting=self.workers.meetings[members[0]],
        )

    async def park(self, lease: Lease) -> JobParked:
        """Have a job parked; its report."""
        await self.bus.request(
            PARK_JOB, ParkJob(job_id=lease.job_id, epoch=lease.epoch), lease.leader, deadline_s=WAIT_S
        )
        await self.until(lambda: any(report.job_id == lease.job_id for report in self.parked))
        return self.parked[-1]

    async def revoke(self, lease: Lease) -> None:
        """Take a job from its members, one after the other in any order."""
        for instance in reversed(lease.members):
            revoke = RevokeLease(job_id=lease.job_id, epoch=lease.epoch)
            await self.bus.request(REVOKE_LEASE, revoke, instance, deadline_s=WAIT_S)

    def of_job(self, job_id: str) -> list[StepFinished]:
        """Its steps, as they were reported."""
        return [report for report in self.reports if report.job_id == job_id]

    async def finished(self, lease: Lease) -> torch.Tensor:
        """The final latent of a lease."""
        while True:
            report = await asyncio.wait_for(self.latents.get(), WAIT_S)
            if report.epoch == lease.epoch:
                return await self.tensors.fetch(report.latent, deadline_s=WAIT_S)

    def longest_pause_s(self, lease: Lease) -> float:
        """The longest time between the end of a step and the start of the next."""
        reports = self._reports[lease.epoch]
        return max(later.started_at_s - sooner.ended_at_s for sooner, later in pairwise(reports))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once ``holds`` does, looking whenever something was reported."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    @contextlib.asynccontextmanager
    async def hearing(self) -> AsyncIterator[None]:
        subscriptions = [
            await self.bus.serve(DENOISING_FINISHED, self._denoised),
            await self.bus.serve(PHASE_FAILED, self._failed),
            await self.bus.serve(JOB_PARKED, self._job_parked),
            await self.bus.subscribe(GROUP_LOST, self._group_lost),
            await self.bus.subscribe(STEP_FINISHED, self._stepped),
            await self.bus.subscribe(CHECKPOINT_STORED, self._checkpointed),
        ]
        self._launcher.start()
        try:
            yield
        finally:
            for running in self._running.values():
                running.signal(signal.SIGKILL)
            for running in self._running.values():
                await running.ended
            await self._launcher.close()
            for subscription in subscriptions:
                await subscription.stop()

    async def _denoised(self, report: DenoisingFinished) -> Acknowledged:
        self.latents.put_nowait(report)
        return Acknowledged()

    async def _failed(self, report: PhaseFailed) -> Acknowledged:
        self.failures.append(report)
        self._news.set()
        return Acknowledged()

    async def _job_parked(self, report: JobParked) -> Acknowledged:
        self.parked.append(report)
        self._news.set()
        return Acknowledged()

    def _group_lost(self, report: GroupLost) -> None:
        self.lost.append(report)
        self._news.set()

    def _stepped(self, report: StepFinished) -> None:
        self.reports.append(report)
        self.steps[report.epoch].append(report.step)
        self._reports[report.epoch].append(report)
        self._news.set()

    def _checkpointed(self, report: CheckpointStored) -> None:
        self.stored[report.job_id].append(report.step)
        self._news.set()


@contextlib.asynccontextmanager
async def denoising_stage(model: Path, folder: Path) -> AsyncIterator[DenoisingStage]:
    """A stage without processes yet; all that were started are gone at its end."""
    async with (
        running_nats_server() as server,
        await NatsBus.connect(server.url, name="scheduler") as bus,
        await UcxTensors.open(owner="scheduler") as tensors,
    ):
        await bus.prepare(buckets=VIDEO_BUCKETS)
        stage = DenoisingStage(server, bus, tensors, model, folder)
        async with stage.hearing():
            yield stage
