"""A scheduler, an encoder, four DiT workers and cache stores as real processes; the test decodes and looks on.

The test's decoders take the final latents of videos as they are, so that they can be compared to the last bit.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch

from common.bus.errors import BusError
from common.bus.nats_bus import NatsBus
from common.bus.port import Bus
from common.messages.cluster import Service
from common.messages.failures import Acknowledged, Stage
from common.messages.subjects import (
    CANCEL_DECODING,
    CHECKPOINT_STORED,
    DECODE_VIDEO,
    DECODING_FINISHED,
    GRANT_LEASE,
    GROUP_CALLED,
    PARK_JOB,
    STEP_FINISHED,
    VIDEO_BUCKETS,
    VIDEO_JOBS,
    VIDEO_OBJECTS,
    VIDEO_QUEUES,
    VIDEO_RECORDS,
    EventSubject,
)
from common.messages.video import (
    CancelDecoding,
    CheckpointStored,
    DecodeVideo,
    DecodingFinished,
    GroupCalled,
    Lease,
    ParkJob,
    StepFinished,
    VideoFile,
    VideoQueued,
    VideoRecord,
    VideoRequest,
    VideoState,
)
from common.policies.video.rib import Rib
from common.runtime.leases import LeaseHolder
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from common.tensors.errors import TensorError
from common.tensors.ucx import UcxTensors
from tests.support.nats_server import NatsServer, running_nats_server
from tests.support.processes import WAIT_S, Processes

DIT = ("dit-0", "dit-1", "dit-2", "dit-3")
SERVICES = ("scheduler-0", "encoder-0", "cache_store-0", *DIT)
NATS = "nats-0"
# Overheard beside those who are asked.
_GRANTS = EventSubject(GRANT_LEASE.pattern, Lease)
_PARKS = EventSubject(PARK_JOB.pattern, ParkJob)


class Decoder:
    """The VAE worker of one slot: its file is the latent's bytes."""

    def __init__(self, bus: Bus, tensors: UcxTensors, slot: int, latents: dict[str, torch.Tensor]) -> None:
        self.instance = f"vae-{slot}"
        self._bus = bus
        self._tensors = tensors
        self._slot = slot
        self._latents = latents
        self._leases = LeaseHolder[DecodeVideo](bus, Stage.VAE, self.instance, self._decode)

    @contextlib.asynccontextmanager
    async def working(self, url: str) -> AsyncIterator[None]:
        settings = ServiceSettings(nats_url=url, instance=self.instance, slot=self._slot)
        async with Registration(self._bus, settings, Service.VAE) as registration:
            subscriptions = [
                await self._bus.serve(DECODE_VIDEO, self._leases.grant, self.instance),
                await self._bus.serve(CANCEL_DECODING, self._cancel, self.instance),
            ]
            working = asyncio.create_task(self._leases.run())
            await registration.ready()
            try:
                yield
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                for subscription in subscriptions:
                    await subscription.stop()

    async def _cancel(self, request: CancelDecoding) -> Acknowledged:
        self._leases.revoke(request.job_id, request.epoch)
        return Acknowledged()

    async def _decode(self, work: DecodeVideo) -> None:
        try:
            latent = await self._tensors.fetch(work.latent, deadline_s=5.0)
        except TensorError as error:
            await self._leases.report_failure(work, "decoding_interrupted", str(error), retryable=True)
            return
        self._latents[work.job_id] = latent
        file = VideoFile(object_name=work.object_name, size_bytes=1, sha256="")
        now_s = time.time()
        report = DecodingFinished(
            job_id=work.job_id,
            epoch=work.epoch,
            instance=self.instance,
            slot=self._slot,
            file=file,
            started_at_s=now_s,
            ended_at_s=now_s,
        )
        await self._leases.report(work, DECODING_FINISHED, report)


class Cluster(Processes):
    """What the videos' workers report, their final latents, and how to kill whom.

    ``steps``: by job, as they were reported; ``leases``: by job, in the order in which any member was first asked;
    ``regroups``: how many messages there were that change a group, or have one meet. ``stored``: by job, the
    checkpoints as they were told of.
    """

    def __init__(
        self,
        server: NatsServer,
        bus: Bus,
        tensors: UcxTensors,
        model: Path,
        folder: Path,
        settings: dict[str, str],
        services: tuple[str, ...],
    ) -> None:
        super().__init__(server, bus, model, folder)
        self.services = services
        self.stored: dict[str, list[CheckpointStored]] = defaultdict(list)
        self.steps: dict[str, list[StepFinished]] = defaultdict(list)
        self.latents: dict[str, torch.Tensor] = {}
        self.leases: dict[str, list[Lease]] = defaultdict(list)
        self.regroups = 0
        self._server = server
        self._settings = settings
        self._decoders = [Decoder(bus, tensors, slot, self.latents) for slot in range(len(DIT))]
        self._news = asyncio.Event()

    async def submit(self, job_id: str, request: VideoRequest) -> None:
        now_s = time.time()
        record = VideoRecord(
            job_id=job_id, state=VideoState.QUEUED, request=request, created_at_s=now_s, updated_at_s=now_s
        )
        await self.bus.create(VIDEO_RECORDS, job_id, record)
        await self.bus.enqueue(VIDEO_JOBS, VideoQueued(job_id=job_id), job_id)

    async def completed(self, job_id: str) -> torch.Tensor:
        """The final latent, once the job is completed."""
        async with asyncio.timeout(WAIT_S):
            # Asked again and again: a watch would have to outlive the broker.
            while not (record := await self._record(job_id)).state.terminal:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert record.state is VideoState.COMPLETED, f"{job_id}: {record.failure}"
        return self.latents[job_id]

    async def _record(self, job_id: str) -> VideoRecord:
        while True:
            with contextlib.suppress(BusError):
                return (await self.bus.get(VIDEO_RECORDS, job_id)).value
            await asyncio.sleep(0.05)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once ``holds`` does, looking whenever something was reported."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def restart(self, *victims: str) -> None:
        """Kill them, one after the other; their next lives begin at once."""
        for victim in victims:
            await (self._server.kill() if victim == NATS else self.kill(victim))
        for victim in victims:
            await (self._server.start() if victim == NATS else self.start(victim, **self._settings))

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        subscriptions = [
            await self.bus.subscribe(STEP_FINISHED, self._stepped),
            await self.bus.subscribe(GROUP_CALLED, self._regroups),
            await self.bus.subscribe(_PARKS, self._regroups),
            await self.bus.subscribe(_GRANTS, self._granted),
            await self.bus.subscribe(CHECKPOINT_STORED, self._checkpointed),
        ]
        async with contextlib.AsyncExitStack() as decoders, self.running():
            for decoder in self._decoders:
                await decoders.enter_async_context(decoder.working(self._server.url))
            for instance in self.services:
                await self.start(instance, **self._settings)
            await self.ready(*self.services)
            yield
        for subscription in subscriptions:
            await subscription.stop()

    def _stepped(self, report: StepFinished) -> None:
        self.steps[report.job_id].append(report)
        self._news.set()

    def _checkpointed(self, report: CheckpointStored) -> None:
        self.stored[report.job_id].append(report)

    def _granted(self, lease: Lease) -> None:
        leases = self.leases[lease.job_id]
        if not leases or lease.epoch > leases[-1].epoch:
            leases.append(lease)
        self._regroups(lease)

    def _regroups(self, _: Lease | GroupCalled | ParkJob) -> None:
        self.regroups += 1
        self._news.set()


@contextlib.asynccontextmanager
async def running_cluster(
    model: Path, folder: Path, policy: str, rib: Rib, services: tuple[str, ...] = SERVICES, **settings: str
) -> AsyncIterator[Cluster]:
    """A cluster that takes videos; all of its processes are gone at the end. ``settings`` are for all of them."""
    profile = folder / "rib.json"
    profile.write_text(rib.to_json())
    async with (
        running_nats_server() as server,
        await NatsBus.connect(server.url, name="client") as bus,
        await UcxTensors.open(owner="decoders") as tensors,
    ):
        await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
        scheduling = {"TRIPTYCH_POLICY": policy, "TRIPTYCH_RIB": str(profile)}
        # Who dies is known by its next life, and by nobody answering: silence is a busy machine's.
        scheduling["TRIPTYCH_MEMBER_TIMEOUT_S"] = "20"
        cluster = Cluster(server, bus, tensors, model, folder, settings | scheduling, services)
        async with cluster.working():
            yield cluster
