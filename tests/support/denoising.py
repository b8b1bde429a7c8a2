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
    GRANT_LEASE,
    MEMBERS,
    PHASE_FAILED,
    STEP_FINISHED,
    VIDEO_BUCKETS,
)
from common.messages.video import (
    Checkpoint,
    CheckpointStored,
    DenoisingFinished,
    Lease,
    PhaseFailed,
    StepFinished,
    VideoRequest,
)
from common.tensors.ucx import UcxTensors
from compose.launch import ForkLauncher, Launch, Running
from services.scheduler.checkpoints import Checkpoints
from tests.support.nats_server import NatsServer, running_nats_server

WAIT_S = 60.0
_PRELOAD = ("common.runtime.worker", "common.models.opensora.pipeline")


class DenoisingStage:
    """Starts, kills and asks the processes, and hears what they report."""

    def __init__(self, server: NatsServer, bus: NatsBus, tensors: UcxTensors, model: Path, folder: Path) -> None:
        self.bus = bus
        self.tensors = tensors
        self.checkpoints = Checkpoints(bus, lambda: False)
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
            "TRIPTYCH_SLOT": "0",
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
        environment = self._environment | {"TRIPTYCH_INSTANCE": instance} | settings
        command = ("python", "-m", f"services.{instance.rpartition('-')[0]}")
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
        """Have a job denoised, from the beginning or from ``resume`` on."""
        self._epoch += 1
        embeddings = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
        lease = Lease(
            job_id=job_id,
            epoch=self._epoch,
            members=(instance,),
            leader=instance,
            request=request,
            text=self.tensors.export(embeddings, uses=1, lease_s=WAIT_S),
            resume=resume,
        )
        await self.bus.request(GRANT_LEASE, lease, instance, deadline_s=WAIT_S)
        return lease

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

    def _stepped(self, report: StepFinished) -> None:
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
