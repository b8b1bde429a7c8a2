"""How a job starts on a worker: its embeddings fetched, its latent from the seed or from a checkpoint."""

import structlog
import torch

from common.bus.errors import BusError
from common.messages.cache import FindTensor
from common.messages.subjects import FIND_TENSOR
from common.messages.tensors import TensorRef
from common.messages.video import Checkpoint, Lease, checkpoint_key
from common.models.opensora.pipeline import Denoiser
from common.runtime.worker import Equipment
from common.tensors.errors import TensorError
from services.dit.member import HeldVideo

log = structlog.get_logger()

FETCH_DEADLINE_S = 10.0
# Beginning again is the remedy, so this is not worth a long wait.
CHECKPOINT_FETCH_DEADLINE_S = 5.0
CHECKPOINT_FIND_DEADLINE_S = 1.0


class JobStarter:
    """Makes the video of a lease that starts ready for its next step."""

    def __init__(self, equipment: Equipment, denoiser: Denoiser) -> None:
        self._bus = equipment.bus
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
        step, latent = await self._resumed(lease)
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
            steps_done=step,
        )
        return HeldVideo(lease.job_id, request, run, text, negative)

    async def decline(self, lease: Lease) -> None:
        """Have what a lease that starts refers to forgotten where it lies: nobody will fetch it."""
        refs = [lease.text, lease.negative, lease.resume.latent if lease.resume is not None else None]
        for ref in refs:
            if ref is not None:
                await self._tensors.release(ref)

    async def _resumed(self, lease: Lease) -> tuple[int, torch.Tensor | None]:
        """The latent to go on from, and after how many steps; 0 and None to begin with the first one.

        Where the one that the lease names is gone, its keeper having died since, whatever the cache stores have is as
        good as the steps since then are few.
        """
        if lease.resume is None:
            return 0, None
        latent = await self._fetched(lease, lease.resume)
        if latent is not None:
            return lease.resume.step, latent
        stored = await self._stored(lease.job_id)
        latent = await self._fetched(lease, stored) if stored is not None else None
        if stored is not None and latent is not None:
            return stored.step, latent
        log.warning("checkpoint not fetched, beginning again", job=lease.job_id)
        return 0, None

    async def _fetched(self, lease: Lease, resume: Checkpoint) -> torch.Tensor | None:
        """The checkpoint's latent; None where it cannot be had or does not fit."""
        request = lease.request
        if not 0 < resume.step <= request.steps:
            return None
        shape = self._denoiser.latent_shape(request.frames, request.height, request.width)
        # Torch's own memory, aligned like any step's latent: the steps that follow come out bit for bit the same.
        latent = torch.empty(shape, dtype=torch.float32, device=self._denoiser.device)
        try:
            await self._tensors.fetch(resume.latent, latent, deadline_s=CHECKPOINT_FETCH_DEADLINE_S)
        except TensorError as error:
            log.warning("latent not fetched", job=lease.job_id, step=resume.step, reason=str(error))
            return None
        log.info("going on from a checkpoint", job=lease.job_id, step=resume.step)
        return latent

    async def _stored(self, job_id: str) -> Checkpoint | None:
        request = FindTensor(key=checkpoint_key(job_id))
        try:
            found = await self._bus.request(FIND_TENSOR, request, deadline_s=CHECKPOINT_FIND_DEADLINE_S)
        except BusError as error:
            log.warning("no cache store to ask", job=job_id, reason=str(error))
            return None
        if found.tensor_version is None or found.tensor is None:
            return None
        return Checkpoint(step=found.tensor_version, latent=found.tensor)
