"""Plays encoder, DiT and VAE workers towards a real scheduler over a real broker, as far as a test lets them."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator

from common.bus.nats_bus import NatsBus
from common.bus.port import Bus, Subscription
from common.messages.base import Message
from common.messages.cluster import Ping, Service
from common.messages.failures import Acknowledged, Failure, Stage
from common.messages.subjects import (
    CANCEL_DECODING,
    DECODE_VIDEO,
    DECODING_FINISHED,
    DENOISING_FINISHED,
    ENCODE_PROMPT,
    FIND_LATENT,
    GRANT_LEASE,
    GROUP_LOST,
    JOB_PARKED,
    PARK_JOB,
    PHASE_FAILED,
    PING,
    REVOKE_LEASE,
    STEP_FINISHED,
    VIDEO_FILES,
)
from common.messages.tensors import TensorRef
from common.messages.video import (
    CancelDecoding,
    DecodeVideo,
    DecodingFinished,
    DenoisingFinished,
    EncodePrompt,
    FindLatent,
    GroupLost,
    JobParked,
    LatentFound,
    Lease,
    LeasesRevoked,
    ParkJob,
    PhaseFailed,
    PromptEncoded,
    RevokeLease,
    StepFinished,
    VideoFile,
)
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings

WAIT_S = 60.0


class PlayedWorker:
    """One member of the cluster. What it is asked for is put into the queues; a test answers when it likes."""

    def __init__(self, bus: Bus, service: Service, slot: int | None) -> None:
        self.bus = bus
        self.service = service
        self.slot = slot
        self.instance = f"{service}-{slot or 0}"
        self.leases: asyncio.Queue[Lease] = asyncio.Queue(100)
        self.parks: asyncio.Queue[ParkJob] = asyncio.Queue(100)
        self.revoked: asyncio.Queue[RevokeLease] = asyncio.Queue(100)
        self.decodings: asyncio.Queue[DecodeVideo] = asyncio.Queue(100)
        self.cancelled: asyncio.Queue[CancelDecoding] = asyncio.Queue(100)
        self.encoded: list[str] = []
        # Of which jobs, taken back from this worker, the latent is kept here, and after how many steps.
        self.kept: dict[str, int] = {}
        self._asked: list[Message] = []
        # Cleared by a test, this worker is busy: it answers to no lease and no decoding before it is set again.
        self.free = asyncio.Event()
        self.free.set()
        self.meeting = f"where {self.instance} leads"
        self._life: contextlib.AsyncExitStack | None = None

    async def join(self, url: str) -> None:
        """Register and take work."""
        settings = ServiceSettings(nats_url=url, instance=self.instance, slot=self.slot, heartbeat_s=0.1)
        self._life = contextlib.AsyncExitStack()
        registration = await self._life.enter_async_context(Registration(self.bus, settings, self.service))
        for subscription in await self._listen():
            self._life.push_async_callback(subscription.stop)
        await registration.ready(meeting=self.meeting)

    async def leave(self) -> None:
        """Withdraw, with whatever was under way."""
        if self._life is not None:
            await self._life.aclose()
            self._life = None

    async def _listen(self) -> list[Subscription]:
        match self.service:
            case Service.ENCODER:
                return [await self.bus.serve(ENCODE_PROMPT, self._encode, self.instance)]
            case Service.DIT:
                return [
                    await self.bus.serve(GRANT_LEASE, self._lease, self.instance),
                    await self.bus.serve(PARK_JOB, self._park, self.instance),
                    await self.bus.serve(PING, self._pinged, self.instance),
                    await self.bus.serve(REVOKE_LEASE, self._revoke, self.instance),
                    await self.bus.serve(FIND_LATENT, self._find_latent, self.instance),
                ]
            case _:
                return [
                    await self.bus.serve(DECODE_VIDEO, self._decode, self.instance),
                    await self.bus.serve(CANCEL_DECODING, self._cancel, self.instance),
                ]

    async def _encode(self, request: EncodePrompt) -> PromptEncoded:
        self.encoded.append(request.job_id)
        now_s = time.time()
        return PromptEncoded(job_id=request.job_id, text=self.ref(1), started_at_s=now_s, ended_at_s=now_s)

    def _is_new(self, request: Message) -> bool:
        """What the scheduler asks again, because no answer has come yet, is one thing to do."""
        new = request not in self._asked
        self._asked.append(request)
        return new

    async def _lease(self, lease: Lease) -> Acknowledged:
        if self._is_new(lease):
            self.leases.put_nowait(lease)
        await asyncio.wait_for(self.free.wait(), WAIT_S)
        return Acknowledged()

    async def _park(self, request: ParkJob) -> Acknowledged:
        if self._is_new(request):
            self.parks.put_nowait(request)
        return Acknowledged()

    async def _pinged(self, _: Ping) -> Acknowledged:
        return Acknowledged()

    async def _revoke(self, request: RevokeLease) -> LeasesRevoked:
        if request.job_id is not None and self._is_new(request):
            self.revoked.put_nowait(request)
        return LeasesRevoked(job_id=next(iter(self.kept), None))

    async def _find_latent(self, request: FindLatent) -> LatentFound:
        step = self.kept.get(request.job_id, 0)
        return LatentFound(step=step, latent=self.ref(step) if request.uses else None)

    async def _decode(self, work: DecodeVideo) -> Acknowledged:
        if self._is_new(work):
            self.decodings.put_nowait(work)
        await asyncio.wait_for(self.free.wait(), WAIT_S)
        return Acknowledged()

    async def _cancel(self, request: CancelDecoding) -> Acknowledged:
        if request.job_id is not None and self._is_new(request):
            self.cancelled.put_nowait(request)
        return Acknowledged()

    def ref(self, tensor_id: int) -> TensorRef:
        return TensorRef(
            owner=self.instance, tensor_id=tensor_id, address=b"here", shape=(1,), dtype="float32", size_bytes=4
        )

    async def next_lease(self) -> Lease:
        return await asyncio.wait_for(self.leases.get(), WAIT_S)

    async def next_park(self) -> ParkJob:
        return await asyncio.wait_for(self.parks.get(), WAIT_S)

    async def next_revoked(self) -> RevokeLease:
        return await asyncio.wait_for(self.revoked.get(), WAIT_S)

    async def next_decoding(self) -> DecodeVideo:
        return await asyncio.wait_for(self.decodings.get(), WAIT_S)

    async def next_cancelled(self) -> CancelDecoding:
        return await asyncio.wait_for(self.cancelled.get(), WAIT_S)

    async def do_step(self, lease: Lease, step: int, next_epoch: int | None = None) -> None:
        now_s = time.time()
        report = StepFinished(
            job_id=lease.job_id,
            epoch=lease.epoch,
            instance=self.instance,
            slots=lease.slots,
            step=step,
            steps=lease.request.steps,
            started_at_s=now_s - 0.01,
            ended_at_s=now_s,
            next_epoch=next_epoch,
        )
        await self.bus.publish(STEP_FINISHED, report, lease.job_id)

    async def lose_group(self, lease: Lease) -> None:
        report = GroupLost(
            job_id=lease.job_id, epoch=lease.epoch, instance=self.instance, members=lease.members, reason="silence"
        )
        await self.bus.publish(GROUP_LOST, report, lease.job_id)

    async def finish_parking(self, lease: Lease, step: int) -> None:
        report = JobParked(job_id=lease.job_id, epoch=lease.epoch, instance=self.instance, step=step)
        await self.bus.request(JOB_PARKED, report, deadline_s=WAIT_S)

    async def finish_denoising(self, lease: Lease) -> None:
        report = DenoisingFinished(
            job_id=lease.job_id, epoch=lease.epoch, instance=self.instance, latent=self.ref(lease.epoch)
        )
        await self.bus.request(DENOISING_FINISHED, report, deadline_s=WAIT_S)

    async def finish_decoding(self, work: DecodeVideo) -> VideoFile:
        data = f"the file of {work.job_id}".encode()
        stored = await self.bus.put_object(VIDEO_FILES, work.object_name, data)
        assert stored.sha256 == hashlib.sha256(data).hexdigest()
        file = VideoFile(object_name=work.object_name, size_bytes=stored.size_bytes, sha256=stored.sha256)
        now_s = time.time()
        report = DecodingFinished(
            job_id=work.job_id,
            epoch=work.epoch,
            instance=self.instance,
            slot=self.slot or 0,
            file=file,
            started_at_s=now_s,
            ended_at_s=now_s,
        )
        await self.bus.request(DECODING_FINISHED, report, deadline_s=WAIT_S)
        return file

    async def fail(self, work: Lease | DecodeVideo, code: str, *, retryable: bool) -> None:
        stage = Stage.DIT if isinstance(work, Lease) else Stage.VAE
        failure = Failure(stage=stage, code=code, message=f"{code} happened", retryable=retryable)
        report = PhaseFailed(job_id=work.job_id, epoch=work.epoch, instance=self.instance, failure=failure)
        await self.bus.request(PHASE_FAILED, report, deadline_s=WAIT_S)


@contextlib.asynccontextmanager
async def played_worker(url: str, service: Service, slot: int | None = None) -> AsyncIterator[PlayedWorker]:
    """A worker that has joined; it leaves at the end of the block if it has not before."""
    bus = await NatsBus.connect(url, name=f"played-{service}")
    worker = PlayedWorker(bus, service, slot)
    try:
        await worker.join(url)
        yield worker
    finally:
        await worker.leave()
        await bus.close()
