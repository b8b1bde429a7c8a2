"""The DiT worker's settings."""

from pydantic import Field

from common.runtime.settings import WorkerSettings


class DitSettings(WorkerSettings):
    """``latent_lease_s``: how long a finished latent waits for its VAE worker."""

    latent_lease_s: float = Field(default=120.0, gt=0)
