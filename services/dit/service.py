"""The DiT process: one slot, one lease at a time, one denoising step after the other.

Nothing in the step loop waits for the scheduler: steps are reported, not acknowledged, and a lease that was revoked
or overtaken is noticed between two steps (DDiT, section 6: changes take effect at the next step boundary). Nor does it
wait for the cache store, to which the latent goes every few steps.
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
from common.models.opensora.pipeline import Denoiser, DenoisingRun
from common.runtime.leases import LeaseHolder, LeaseLost
from common.runtime.worker import Equipment, serve_worker
from common.tensors.errors import TensorError
from services.dit.checkpoints import CheckpointWriter, Snapshot, copy_cost_s, take_step
from services.dit.config import DitSettings
from services.dit.interval import CheckpointInterval

log = structlog.get_logger()

FETCH_DEADLINE_S = 10.0
# Beginning again is the remedy, so this is not worth a long wait.
CHECKPOINT_FETCH_DEADLINE_S = 5.0


class DitWorker:
    """Denoises for the lease it holds."""

    def __init__(self, equipment: Equipment, denoiser: Denoiser, settings: DitSettings) -> None:
        self._instance = equipment.instance
        self._slots = (equipment.slot or 0,)
        self._bus = equipment.bus
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._denoiser = denoiser
        self._latent_lease_s = settings.latent_lease_s
        self._checkpoint_steps = None if settings.checkpoint_steps == "auto" else settings.checkpoint_steps
        self._checkpoints = CheckpointWriter(equipment.bus, equipment.tensors)
        self._leases = LeaseHolder[Lease](equipment.bus, Stage.DIT, equipment.instance, self._work_off)

    async def listen(self) -> Sequence[Subscription]:
        return (
            await self._bus.serve(GRANT_LEASE, self._leases.grant, self._instance),
            await self._bus.serve(REVOKE_LEASE, self._revoke, self._instance),
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._leases.run(), name="leases")
            tasks.create_task(self._checkpoints.run(), name="checkpoints")

    async def finish(self) -> None:
        """The lease under way is done, its checkpoint is stored, and the VAE has fetched its latent."""
        await self._leases.idle.wait()
        await self._checkpoints.idle.wait()
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
        run = await self._start(lease)
        interval = CheckpointInterval(await self._compute.run(copy_cost_s, run.latent), self._checkpoint_steps)
        for step in range(run.steps_done + 1, request.steps + 1):
            self._leases.check(lease)
            started_at_s = time.time()
            latent = await self._compute.run(take_step, run, interval)
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
            if latent is not None:
                # Not for a lease that was revoked meanwhile: a job that has ended would leave a checkpoint behind.
                self._leases.check(lease)
                self._checkpoints.offer(Snapshot(lease.job_id, lease.epoch, step, latent))
        return run.latent

    async def _start(self, lease: Lease) -> DenoisingRun:
        """The job at its first step, or after that of the checkpoint it goes on from."""
        request = lease.request
        text = await self._tensors.fetch(lease.text, deadline_s=FETCH_DEADLINE_S)
        negative = None
        if lease.negative is not None:
            negative = await self._tensors.fetch(lease.negative, deadline_s=FETCH_DEADLINE_S)
        latent = await self._resumed(lease)
        return await self._compute.run(
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
            latent=latent,
            steps_done=lease.resume.step if lease.resume is not None and latent is not None else 0,
        )

    async def _resumed(self, lease: Lease) -> torch.Tensor | None:
        """The checkpoint's latent; None where there is none that fits, so that the job begins again."""
        request = lease.request
        if lease.resume is None or not 0 < lease.resume.step <= request.steps:
            return None
        shape = self._denoiser.latent_shape(request.frames, request.height, request.width)
        # Torch's own memory, aligned like any step's latent: the steps that follow come out bit for bit the same.
        latent = torch.empty(shape, dtype=torch.float32, device=self._denoiser.device)
        try:
            await self._tensors.fetch(lease.resume.latent, latent, deadline_s=CHECKPOINT_FETCH_DEADLINE_S)
        except TensorError as error:
            log.warning("checkpoint not fetched, beginning again", job=lease.job_id, reason=str(error))
            return None
        log.info("going on from a checkpoint", job=lease.job_id, step=lease.resume.step)
        return latent

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
        return DitWorker(equipment, denoiser, settings)

    await serve_worker(settings, stop, Service.DIT, Denoiser, make)
