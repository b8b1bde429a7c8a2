"""The 2-D half of Open-Sora 1.2's autoencoder: the KL autoencoder of latent diffusion (arXiv 2112.10752).

Module names and arithmetic are those of diffusers' `AutoencoderKL`, whose weights the checkpoints hold; written
out here because importing diffusers takes longer than loading the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.group_norm import norm_silu
from common.models.opensora.latents import LatentDistribution
from common.models.opensora.vae_config import SpatialVAEConfig

# The published code multiplies 2-D latents by this constant, whatever the 2-D VAE's own configuration says.
SPATIAL_LATENT_FACTOR = 0.18215
_EPS = 1e-6


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut (1x1 where the channel count changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class AttentionBlock2D(nn.Module):
    """One attention head over all pixels of [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        attended: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return x + attended[:, 0].transpose(1, 2).reshape(x.shape)


class MidBlock2D(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock2D(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Downsample2D(nn.Module):
    """Halves both sides; the padding is at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample2D(nn.Module):
    """Doubles both sides by repeating pixels, then smooths."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level2D(nn.Module):
    """Residual blocks at one resolution, then the change to the next (`downsamplers` or `upsamplers`)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, change: str, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if index == 0 else out_channels, out_channels, groups) for index in range(blocks)
        )
        sampler = Downsample2D if change == "downsamplers" else Upsample2D
        self.change = change
        self.add_module(change, nn.ModuleList([] if last else [sampler(out_channels)]))

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.get_submodule(self.change).children()):
            x = module(x)
        return x


class Encoder2D(nn.Module):
    """Frames [B, 3, H, W] to moments [B, 2 * latent_channels, H / factor, W / factor], before `quant_conv`."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level2D(before, width, config.layers_per_block, groups, "downsamplers", index == len(widths) - 1)
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock2D(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(norm_silu(self.conv_norm_out, x))
        return out


class Decoder2D(nn.Module):
    """Latents after `post_quant_conv` to frames [B, 3, H, W]."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            Level2D(before, width, config.layers_per_block + 1, groups, "upsamplers", index == len(widths) - 1)
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock2D(widths[0], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(norm_silu(self.conv_norm_out, x))
        return out


class AutoencoderKL(nn.Module):
    """Frames [B, 3, H, W] in [-1, 1] to a distribution over 2-D latents, and back."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder = Encoder2D(config)
        self.decoder = Decoder2D(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x: Tensor) -> LatentDistribution:
        return LatentDistribution.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        frames: Tensor = self.decoder(self.post_quant_conv(z))
        return frames


class SpatialVAE(nn.Module):
    """An `AutoencoderKL`, applied to each frame of [B, C, T, H, W] on its own, some frames at a time."""

    def __init__(self, config: SpatialVAEConfig, micro_batch_size: int | None) -> None:
        super().__init__()
        self.module = AutoencoderKL(config)
        self.micro_batch_size = micro_batch_size

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames in [-1, 1] to 2-D latents: a sample if a generator is given, else the mean."""
        latents = []
        for part in self._parts(x):
            posterior = self.module.encode(part)
            latents.append(posterior.mean if generator is None else posterior.sample(generator))
        return _as_video(torch.cat(latents) * SPATIAL_LATENT_FACTOR, x.shape[0])

    def decode(self, z: Tensor) -> Tensor:
        """2-D latents to frames in about [-1, 1]."""
        parts = self._parts(z / SPATIAL_LATENT_FACTOR)
        return _as_video(torch.cat([self.module.decode(part) for part in parts]), z.shape[0])

    def _parts(self, video: Tensor) -> tuple[Tensor, ...]:
        frames = video.transpose(1, 2).flatten(0, 1)
        return torch.split(frames, self.micro_batch_size or frames.shape[0])


def _as_video(frames: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] to [B, C, T, H, W]."""
    return frames.view(batch, -1, *frames.shape[1:]).transpose(1, 2)
