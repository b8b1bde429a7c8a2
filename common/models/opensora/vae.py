"""The autoencoder of Open-Sora 1.2: a 2-D VAE frame by frame, then a temporal VAE over micro-frames.

Videos are float [B, 3, T, H, W] in [-1, 1]; latents are normalised by `shift` and `scale`. Key names are the
published ones (`spatial_vae.module.`, `temporal_vae.`, `scale`, `shift`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.models.opensora.spatial_vae import SpatialVAE
from common.models.opensora.temporal_vae import TemporalVAE
from common.models.opensora.vae_config import OpenSoraVAEConfig, SpatialVAEConfig, TemporalVAEConfig

__all__ = ["OpenSoraVAE", "OpenSoraVAEConfig", "SpatialVAEConfig", "TemporalVAEConfig"]


class OpenSoraVAE(nn.Module):
    """Video [B, 3, T, H, W] to latent [B, C, t, h, w] and back."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(config.spatial, config.micro_batch_size)
        self.temporal_vae = TemporalVAE(config.temporal)
        self.register_buffer("scale", torch.tensor(config.scale)[None, :, None, None, None])
        self.register_buffer("shift", torch.tensor(config.shift)[None, :, None, None, None])

    @property
    def dtype(self) -> torch.dtype:
        return self.temporal_vae.post_quant_conv.conv.weight.dtype

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (t, h, w) of a video of that size."""
        return self.config.latent_size(frames, height, width)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video in [-1, 1] to a normalised latent: drawn with `generator`, or the mean if there is none."""
        parts = []
        sizes = [frames for frames, _ in self.config.chunks(x.shape[2])]
        for part in torch.split(x.to(self.dtype), sizes, dim=2):
            posterior = self.temporal_vae.encode(self.spatial_vae.encode(part, generator))
            parts.append(posterior.mean if generator is None else posterior.sample(generator))
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Decode one micro-frame after the other: [B, 3, frames of it, H, W] each, about [-1, 1]."""
        chunks = self.config.chunks(num_frames)
        expected = sum(latent for _, latent in chunks)
        if z.shape[2] != expected:
            raise ValueError(f"{num_frames} frames have {expected} latent frames, got {z.shape[2]}")
        z = (z * self.scale + self.shift).to(self.dtype)
        parts = torch.split(z, [latent for _, latent in chunks], dim=2)
        for (frames, _), part in zip(chunks, parts, strict=True):
            yield self.spatial_vae.decode(self.temporal_vae.decode(part, frames))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Latent [B, C, t, h, w] to video [B, 3, num_frames, H, W]."""
        return torch.cat(list(self.decode_chunks(z, num_frames)), dim=2)
