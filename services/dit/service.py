"""The DiT process: one slot, one lease at a time, one denoising step after the other.

Nothing in the step loop waits for the scheduler: steps are reported, not acknowledged, and a lease that was revoked
or overtaken is noticed between two steps (DDiT, section 6: changes take effect at the next step boundary).
"""

import asyncio
import time
from collections.abc import Sequence

import structlog
import torch

from common.bus.port import Subscription
from common.messages.cluster import Service
from common.messages.failures import Acknowledged, Stage
from common.messages.subjects import DENOISING_FINISHED, GRANT_LEASE, REVOKE_LEASE, STEP_FINISHED
from common.messages.video import DenoisingFinished, Lease, RevokeLease, StepFinished
from common.models.opensora.pipeline import Denoiser
from common.runtime.leases import LeaseHolder, LeaseLost
from common.runtime.worker import Equipment, serve_worker
from common.tensors.errors import TensorError
from services.dit.config import DitSettings

log = structlog.get_logger()

FETCH_DEADLINE_S = 10.0


class DitWorker:
    """Denoises for the lease it holds."""

    def __init__(self, equipment: Equipment, denoiser: Denoiser, latent_lease_s: float) -> None:
        self._instance = equipment.instance
        self._slots = (equipment.slot or 0,)
        self._bus = equipment.bus
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._denoiser = denoiser
        self._latent_lease_s = latent_lease_s
        self._leases = LeaseHolder[Lease](equipment.bus, Stage.DIT, equipment.instance, self._work_off)

    async def listen(self) -> Sequence[Subscription]:
        return (
            await self._bus.serve(GRANT_LEASE, self._leases.grant, self._instance),
            await self._bus.serve(REVOKE_LEASE, self._revoke, self._instance),
        )

    async def run(self) -> None:
        await self._leases.run()

    async def finish(self) -> None:
        """The lease under way is done and the VAE has fetched its latent."""
        await self._leases.idle.wait()
        # Looked at, not waited for: this happens once in a process's life, and the port promises no event for it.
        while self._tensors.exported_count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def _revoke(self, request: RevokeLease) -> Acknowledged:
        self._leases.revoke(request.job_id, request.epoch)
        return Acknowledged()

    async def _work_off(self, lease: Lease) -> None:
        try:
            latent = await self._denoise(lease)
            await self._hand_over(lease, latent)
        except TensorError as error:
            await self._leases.report_failure(lease, "tensor_not_fetched", str(error), retryable=True)
        except (RuntimeError, ValueError) as error:
            # Out of memory and the like: there is no reason why it should go better elsewhere.
            log.exception("denoising failed", job=lease.job_id)
            await self._leases.report_failure(lease, "denoising_failed", str(error), retryable=False)

    async def _denoise(self, lease: Lease) -> torch.Tensor:
        """The final latent [1, channels, frames, height, width]."""
        request = lease.request
        text = await self._tensors.fetch(lease.text, deadline_s=FETCH_DEADLINE_S)
        negative = None
        if lease.negative is not None:
            negative = await self._tensors.fetch(lease.negative, deadline_s=FETCH_DEADLINE_S)
        run = await self._compute.run(
            self._denoiser.start,
            text,
            negative,
            width=request.width,
            height=request.height,
            frames=request.frames,
            fps=request.fps,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
        )
        for step in range(1, request.steps + 1):
            self._leases.check(lease)
            started_at_s = time.time()
            await self._compute.run(run.step)
            report = StepFinished(
                job_id=lease.job_id,
                epoch=lease.epoch,
                instance=self._instance,
                slots=self._slots,
                step=step,
                steps=request.steps,
                started_at_s=started_at_s,
                ended_at_s=time.time(),
            )
            await self._bus.publish(STEP_FINISHED, report, lease.job_id)
        return run.latent

    async def _hand_over(self, lease: Lease, latent: torch.Tensor) -> None:
        ref = self._tensors.export(latent, uses=1, lease_s=self._latent_lease_s)
        report = DenoisingFinished(job_id=lease.job_id, epoch=lease.epoch, instance=self._instance, latent=ref)
        try:
            await self._leases.report(lease, DENOISING_FINISHED, report)
        except LeaseLost:
            await self._tensors.release(ref)
            raise


async def serve(settings: DitSettings, stop: asyncio.Event) -> None:
    def make(equipment: Equipment, denoiser: Denoiser) -> DitWorker:
        return DitWorker(equipment, denoiser, settings.latent_lease_s)

    await serve_worker(settings, stop, Service.DIT, Denoiser, make)
