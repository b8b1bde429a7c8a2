"""How a job starts on a worker: its embeddings fetched, its latent from the seed or from a checkpoint."""

import structlog
import torch

from common.messages.tensors import TensorRef
from common.messages.video import Lease
from common.models.opensora.pipeline import Denoiser
from common.runtime.worker import Equipment
from common.tensors.errors import TensorError
from services.dit.member import HeldVideo

log = structlog.get_logger()

FETCH_DEADLINE_S = 10.0
# Beginning again is the remedy, so this is not worth a long wait.
CHECKPOINT_FETCH_DEADLINE_S = 5.0


class JobStarter:
    """Makes the video of a lease that starts ready for its next step."""

    def __init__(self, equipment: Equipment, denoiser: Denoiser) -> None:
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._denoiser = denoiser

    async def start(self, lease: Lease, text_ref: TensorRef) -> HeldVideo:
        """The job at its first step, or after that of the checkpoint it goes on from.

        Raises:
            TensorError: the embeddings cannot be had any more.
        """
        request = lease.request
        text = await self._tensors.fetch(text_ref, deadline_s=FETCH_DEADLINE_S)
        negative = None
        if lease.negative is not None:
            negative = await self._tensors.fetch(lease.negative, deadline_s=FETCH_DEADLINE_S)
        latent = await self._resumed(lease)
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
            latent=latent,
            steps_done=lease.resume.step if lease.resume is not None and latent is not None else 0,
        )
        return HeldVideo(lease.job_id, request, run, text, negative)

    async def decline(self, lease: Lease) -> None:
        """Have what a lease that starts refers to forgotten where it lies: nobody will fetch it."""
        refs = [lease.text, lease.negative, lease.resume.latent if lease.resume is not None else None]
        for ref in refs:
            if ref is not None:
                await self._tensors.release(ref)

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
