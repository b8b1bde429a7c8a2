"""What both halves of the autoencoder encode to."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentDistribution:
    """A diagonal Gaussian over latents; `logvar` is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "LatentDistribution":
        """Split [B, 2C, ...] in mean and log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw once. The generator's device decides where the noise is made, so CPU noise is the same anywhere."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)
