"""The temporal half of Open-Sora 1.2's autoencoder: causal 3-D convolutions over 2-D latents.

After MAGVIT-v2 (arXiv 2310.05737) without its codebook: frames are padded at the front only, so a frame never
depends on a later one, and time alone is shortened. Module names are those of the published checkpoint.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.group_norm import norm_silu
from common.models.opensora.latents import LatentDistribution
from common.models.opensora.vae_config import TemporalVAEConfig


class CausalConv3d(nn.Module):
    """A 3-D convolution on [B, C, T, H, W] that sees the past only: all its time padding is in front."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.time_pad = kernel_size - time_stride
        self.space_pad = kernel_size // 2
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size,
            stride=(time_stride, 1, 1),
            padding=(0, self.space_pad, self.space_pad),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.time_pad:
            x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        out: Tensor = self.conv(x)
        return out


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut (1x1x1 where the channel count changes)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        out: Tensor = h + (x if self.conv3 is None else self.conv3(x))
        return out


def _res_blocks(in_channels: int, out_channels: int, config: TemporalVAEConfig) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(in_channels if index == 0 else out_channels, out_channels, config.num_groups)
        for index in range(config.num_res_blocks)
    )


class Encoder(nn.Module):
    """[B, C, T, H, W] to moments [B, 2 * latent_embed_dim, T / time_factor, H, W]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        channels = config.filters
        for index, multiplier in enumerate(config.channel_multipliers):
            width = config.filters * multiplier
            self.block_res_blocks.append(_res_blocks(channels, width, config))
            channels = width
            if index < len(config.temporal_downsample):
                shorten = config.temporal_downsample[index]
                self.conv_blocks.append(CausalConv3d(width, width, 3, time_stride=2) if shorten else nn.Identity())
        self.res_blocks = _res_blocks(channels, channels, config)
        self.norm1 = nn.GroupNorm(config.num_groups, channels)
        self.conv2 = CausalConv3d(channels, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, blocks in enumerate(self.block_res_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if index < len(self.conv_blocks):
                x = self.conv_blocks[index](x)
        for block in self.res_blocks:
            x = block(x)
        out: Tensor = self.conv2(norm_silu(self.norm1, x))
        return out


class Decoder(nn.Module):
    """Latents [B, latent_embed_dim, t, H, W] to [B, C, t * time_factor, H, W]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.temporal_downsample = config.temporal_downsample
        channels = config.filters * config.channel_multipliers[-1]
        self.conv1 = CausalConv3d(config.latent_embed_dim, channels, 3)
        self.res_blocks = _res_blocks(channels, channels, config)
        # Level 0 is the finest in the published names, but the decoder runs from the coarsest to the finest.
        levels: list[nn.ModuleList] = []
        stretches: list[nn.Module] = []
        for index in reversed(range(len(config.channel_multipliers))):
            width = config.filters * config.channel_multipliers[index]
            levels.insert(0, _res_blocks(channels, width, config))
            channels = width
            if index > 0:
                stretch = config.temporal_downsample[index - 1]
                stretches.insert(0, CausalConv3d(width, 2 * width, 3) if stretch else nn.Identity())
        self.block_res_blocks = nn.ModuleList(levels)
        self.conv_blocks = nn.ModuleList(stretches)
        self.norm1 = nn.GroupNorm(config.num_groups, channels)
        self.conv_out = CausalConv3d(channels, config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for index in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[index]:  # type: ignore[attr-defined]
                x = block(x)
            if index > 0:
                x = self.conv_blocks[index - 1](x)
                if self.temporal_downsample[index - 1]:
                    x = _interleave_frames(x)
        out: Tensor = self.conv_out(norm_silu(self.norm1, x))
        return out


def _interleave_frames(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] to [B, C, 2T, H, W]: channel 2c+i of frame t becomes channel c of frame 2t+i."""
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:]).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)


class TemporalVAE(nn.Module):
    """Shortens time by `time_factor`. A count of frames that does not divide is filled up with zeros in front."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> LatentDistribution:
        """[B, in_out_channels, T, H, W] to a distribution over [B, embed_dim, config.latent_frames(T), H, W]."""
        missing = -x.shape[2] % self.config.time_factor
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return LatentDistribution.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Latents of `num_frames` video frames back to [B, in_out_channels, num_frames, H, W]."""
        expected = self.config.latent_frames(num_frames)
        if z.shape[2] != expected:
            raise ValueError(f"{num_frames} frames have {expected} latent frames, got {z.shape[2]}")
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, -num_frames % self.config.time_factor :]
