"""The VAE process: turns a finished latent into an MP4, chunk by chunk, the file's encoder at work meanwhile."""

import asyncio
import contextlib
import time
from collections.abc import Sequence

import structlog
import torch

from common.bus.errors import BusError
from common.bus.port import Subscription
from common.messages.cluster import Service
from common.messages.failures import Acknowledged, Stage
from common.messages.subjects import CANCEL_DECODING, DECODE_VIDEO, DECODING_FINISHED, VIDEO_FILES
from common.messages.video import CancelDecoding, DecodeVideo, DecodingFinished, VideoFile
from common.models.mp4 import Mp4Encoder
from common.models.opensora.pipeline import FrameDecoder
from common.runtime.leases import LeaseHolder, LeaseLost
from common.runtime.settings import WorkerSettings
from common.runtime.worker import ComputeThread, Equipment, serve_worker
from common.tensors.errors import TensorError

log = structlog.get_logger()

FETCH_DEADLINE_S = 10.0


class VaeWorker:
    """Decodes one video at a time."""

    def __init__(self, equipment: Equipment, decoder: FrameDecoder) -> None:
        self._instance = equipment.instance
        self._slot = equipment.slot or 0
        self._bus = equipment.bus
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._filing = ComputeThread("mp4", threads=1)
        self._decoder = decoder
        self._leases = LeaseHolder[DecodeVideo](equipment.bus, Stage.VAE, equipment.instance, self._work_off)

    async def listen(self) -> Sequence[Subscription]:
        return (
            await self._bus.serve(DECODE_VIDEO, self._leases.grant, self._instance),
            await self._bus.serve(CANCEL_DECODING, self._cancel, self._instance),
        )

    async def run(self) -> None:
        try:
            await self._leases.run()
        finally:
            self._filing.close()

    async def finish(self) -> None:
        await self._leases.idle.wait()

    async def _cancel(self, request: CancelDecoding) -> Acknowledged:
        self._leases.revoke(request.job_id, request.epoch)
        return Acknowledged()

    async def _work_off(self, work: DecodeVideo) -> None:
        started_at_s = time.time()
        try:
            latent = await self._tensors.fetch(work.latent, deadline_s=FETCH_DEADLINE_S)
            data = await self._make_file(work, latent)
            stored = await self._bus.put_object(VIDEO_FILES, work.object_name, data)
            report = DecodingFinished(
                job_id=work.job_id,
                epoch=work.epoch,
                instance=self._instance,
                slot=self._slot,
                file=VideoFile(object_name=work.object_name, size_bytes=stored.size_bytes, sha256=stored.sha256),
                started_at_s=started_at_s,
                ended_at_s=time.time(),
            )
            await self._hand_over(work, report)
        except (TensorError, BusError) as error:
            await self._leases.report_failure(work, "decoding_interrupted", str(error), retryable=True)
        except (RuntimeError, ValueError) as error:
            log.exception("decoding failed", job=work.job_id)
            await self._leases.report_failure(work, "decoding_failed", str(error), retryable=False)

    async def _hand_over(self, work: DecodeVideo, report: DecodingFinished) -> None:
        try:
            await self._leases.report(work, DECODING_FINISHED, report)
        except LeaseLost:
            # Nobody will ever ask for this file.
            with contextlib.suppress(BusError):
                await self._bus.delete_object(VIDEO_FILES, work.object_name)
            raise

    async def _make_file(self, work: DecodeVideo, latent: torch.Tensor) -> bytes:
        """The MP4's bytes. While a chunk is decoded, the one before it is being compressed."""
        request = work.request
        file = Mp4Encoder(request.width, request.height, request.fps)
        chunks = self._decoder.decode(latent, request.frames, request.height, request.width)
        compressing: asyncio.Task[None] | None = None
        try:
            while (chunk := await self._compute.run(next, chunks, None)) is not None:
                self._leases.check(work)
                if compressing is not None:
                    await compressing
                compressing = asyncio.create_task(self._filing.run(file.add, chunk))
            if compressing is not None:
                await compressing
            return await self._filing.run(file.finish)
        except BaseException:
            if compressing is not None:
                await asyncio.wait((compressing,))
            file.abandon()
            raise


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    await serve_worker(settings, stop, Service.VAE, FrameDecoder, VaeWorker)
