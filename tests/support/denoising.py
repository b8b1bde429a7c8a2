"""DiT workers and a cache store as real processes, forked from one server, with the test as their scheduler."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from common.bus.nats_bus import NatsBus
from common.messages.cluster import Member
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    CHECKPOINT_STORED,
    DENOISING_FINISHED,
    GROUP_LOST,
    JOB_PARKED,
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
from services.scheduler.checkpoints import Checkpoints
from services.scheduler.workers import Workers
from tests.support.nats_server import NatsServer, running_nats_server
from tests.support.processes import WAIT_S, Processes

# Where this machine stands still for a while, no group is given up for it.
PATIENT = {
    "TRIPTYCH_MEETING_TIMEOUT_S": "60",
    "TRIPTYCH_EXCHANGE_TIMEOUT_S": "60",
    "TRIPTYCH_REGROUP_S": "60",
}


class Outrun(Exception):
    """A job came to its end before the test could do with it what it wanted to."""


async def unless_outrun(play: Callable[[], Awaitable[None]]) -> None:
    """Once more, where this machine gave the test no time in the middle of it."""
    for _ in range(10):
        with contextlib.suppress(Outrun):
            await play()
            return
    raise AssertionError("this machine stands still too often")


class DenoisingStage(Processes):
    """Starts, kills and asks the processes, and hears what they report."""

    def __init__(self, server: NatsServer, bus: NatsBus, tensors: UcxTensors, model: Path, folder: Path) -> None:
        super().__init__(server, bus, model, folder)
        self.tensors = tensors
        self.checkpoints = Checkpoints(bus, self._has_cache_store)
        self.workers = Workers(bus, lambda instance: None)
        self.reports: list[StepFinished] = []
        self.lost: list[GroupLost] = []
        self.parked: list[JobParked] = []
        self.steps: dict[int, list[int]] = defaultdict(list)
        self._reports: dict[int, list[StepFinished]] = defaultdict(list)
        self.stored: dict[str, list[int]] = defaultdict(list)
        self.latents: asyncio.Queue[DenoisingFinished] = asyncio.Queue(100)
        self.failures: list[PhaseFailed] = []
        self._epoch = int(time.time() * 1000)
        self._news = asyncio.Event()

    async def ready(self, *instances: str) -> dict[str, Member]:
        """Return once the newest life of each takes work; where its groups meet is known then."""
        members = await super().ready(*instances)
        self.workers.meetings |= {instance: member.meeting for instance, member in members.items()}
        return members

    def _has_cache_store(self) -> bool:
        return any(name.startswith("cache_store") and not one.ended.done() for name, one in self._running.items())

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

    async def park(self, lease: Lease) -> JobParked | None:
        """Have a job parked; its report. None: its last step was done before."""
        await self.bus.request(
            PARK_JOB, ParkJob(job_id=lease.job_id, epoch=lease.epoch), lease.leader, deadline_s=WAIT_S
        )

        # Of an earlier one it may be told once more.
        def parked() -> JobParked | None:
            return next((report for report in self.parked if report.epoch == lease.epoch), None)

        await self.until(lambda: parked() is not None or self.done(lease))
        return parked()

    async def revoke(self, lease: Lease) -> None:
        """Take a job from its members, one after the other in any order."""
        for instance in reversed(lease.members):
            revoke = RevokeLease(job_id=lease.job_id, epoch=lease.epoch)
            await self.bus.request(REVOKE_LEASE, revoke, instance, deadline_s=WAIT_S)

    def of_job(self, job_id: str) -> list[StepFinished]:
        """Its steps, as they were reported."""
        return [report for report in self.reports if report.job_id == job_id]

    async def all_steps(self, lease: Lease, after: int = 0) -> list[int]:
        """The steps under a lease that began after so many, once the last was reported; the latent may come sooner."""
        last = lease.request.steps
        await self.until(lambda: after == last or last in self.steps[lease.epoch])
        return self.steps[lease.epoch]

    def done(self, lease: Lease) -> bool:
        """Whether the last step of its job was reported."""
        return any(report.step == report.steps for report in self.of_job(lease.job_id))

    async def finished(self, lease: Lease, begun: int | None = None) -> torch.Tensor:
        """The final latent of a lease, or of one since the epoch ``begun`` whose change to it came too late.

        Raises:
            Outrun: the change came too late, and no other latent was asked for.
        """
        first = lease.epoch if begun is None else begun
        while True:
            await self.until(lambda: not self.latents.empty() or bool(self._late(lease)))
            if self.latents.empty():
                self.failures = [failed for failed in self.failures if failed not in self._late(lease)]
                raise Outrun
            report = self.latents.get_nowait()
            if first <= report.epoch <= lease.epoch:
                return await self.tensors.fetch(report.latent, deadline_s=WAIT_S)

    def _late(self, lease: Lease) -> list[PhaseFailed]:
        return [
            failed
            for failed in self.failures
            if failed.epoch == lease.epoch and failed.failure.code == "latent_lost" and lease.text is None
        ]

    def median_pause_s(self, lease: Lease) -> float:
        """The median time between the end of a step and the start of the next."""
        reports = self._reports[lease.epoch]
        return median(later.started_at_s - sooner.ended_at_s for sooner, later in pairwise(reports))

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
        try:
            async with self.running():
                yield
        finally:
            for subscription in subscriptions:
                await subscription.stop()

    async def _denoised(self, report: DenoisingFinished) -> Acknowledged:
        self.latents.put_nowait(report)
        self._news.set()
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
