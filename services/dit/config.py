"""The DiT worker's settings."""

from typing import Literal

from pydantic import Field, PositiveInt

from common.runtime.settings import WorkerSettings


class DitSettings(WorkerSettings):
    """``latent_lease_s``: how long a finished latent waits for its VAE worker.

    ``checkpoint_steps``: a checkpoint every so many steps; ``auto`` takes as few as cost next to nothing.
    """

    latent_lease_s: float = Field(default=120.0, gt=0)
    checkpoint_steps: PositiveInt | Literal["auto"] = "auto"
