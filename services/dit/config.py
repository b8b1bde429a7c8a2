"""The DiT worker's settings."""

from typing import Literal

from pydantic import Field, PositiveInt

from common.models.opensora.parallel import Parallelism, SequenceParallelism
from common.runtime.settings import WorkerSettings


class DitSettings(WorkerSettings):
    """``latent_lease_s``: how long a finished latent waits for its VAE worker.

    ``checkpoint_steps``: a checkpoint every so many steps; ``auto`` takes as few as cost next to nothing.

    ``meeting_host`` is the address at which other DiT workers reach this one, and ``collectives`` what groups exchange
    with; ``auto`` takes NCCL where each worker has a GPU of its own. A member that does not come to a meeting within
    ``meeting_timeout_s``, or stays silent in an exchange for ``exchange_timeout_s``, breaks the group. Its survivors
    keep the latent for ``regroup_s``, in which a new lease must come.

    ``sequence`` and ``guidance_parallel`` say how a group shares a step; all workers of a stack must agree on them.
    """

    latent_lease_s: float = Field(default=120.0, gt=0)
    checkpoint_steps: PositiveInt | Literal["auto"] = "auto"
    meeting_host: str = "127.0.0.1"
    collectives: Literal["auto", "gloo", "nccl"] = "auto"
    meeting_timeout_s: float = Field(default=5.0, gt=0)
    exchange_timeout_s: float = Field(default=20.0, gt=0)
    regroup_s: float = Field(default=6.0, gt=0)
    sequence: SequenceParallelism = SequenceParallelism.DSP
    guidance_parallel: bool = True

    @property
    def parallelism(self) -> Parallelism:
        return Parallelism(self.sequence, self.guidance_parallel)
