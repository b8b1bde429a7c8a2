"""The autoencoder of Open-Sora 1.2: a 2-D VAE frame by frame, then a temporal VAE over micro-frames.

Videos are float [B, 3, T, H, W] in [-1, 1]; latents are normalised by `shift` and `scale`. Key names are the
published ones (`spatial_vae.module.`, `temporal_vae.`, `scale`, `shift`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from common.models.opensora.temporal_vae import LatentDistribution, TemporalVAE, TemporalVAEConfig

# The published code multiplies 2-D latents by this constant, whatever the 2-D VAE's own configuration says.
SPATIAL_LATENT_FACTOR = 0.18215

_IGNORED_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "cal_loss",
        "dtype",
        "force_huggingface",
        "freeze_vae_2d",
        "from_pretrained",
        "local_files_only",
        "model_type",
        "torch_dtype",
        "transformers_version",
    }
)


@dataclass(frozen=True)
class SpatialVAEConfig:
    """The part of a diffusers `AutoencoderKL` configuration that shapes it; the default is SDXL's VAE.

    The published Open-Sora configuration only names that VAE (PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers);
    the weights themselves are in the Open-Sora checkpoint.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    act_fn: str = "silu"
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Video pixels per latent pixel, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def build(self) -> AutoencoderKL:
        levels = len(self.block_out_channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **asdict(self),
        )


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """`micro_frame_size`: video frames the temporal VAE takes at once, None for all; `micro_batch_size`: frames
    the 2-D VAE takes at once, None for a whole micro-frame; `shift`, `scale`: per latent channel."""

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    def __post_init__(self) -> None:
        for name in ("micro_frame_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        if not len(self.shift) == len(self.scale) == self.temporal.embed_dim:
            raise ValueError(
                f"shift and scale need one value for each of the {self.temporal.embed_dim} latent channels"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "OpenSoraVAEConfig":
        """Read a published config.json, or ours, in which `vae_2d` and `vae_temporal` carry a `config` each.

        Raises ValueError naming every key it does not know.
        """
        own = {"vae_2d", "vae_temporal", "micro_frame_size", "shift", "scale"}
        _refuse_unknown("VAE", set(config) - own - _IGNORED_KEYS)
        spatial = dict(config.get("vae_2d") or {})
        temporal = dict(config.get("vae_temporal") or {})
        _refuse_unknown(
            "VAE vae_2d", set(spatial) - {"type", "subfolder", "micro_batch_size", "config"} - _IGNORED_KEYS
        )
        _refuse_unknown("VAE vae_temporal", set(temporal) - {"type", "config"} - _IGNORED_KEYS)
        temporal_config = _read(TemporalVAEConfig, temporal.get("config"), "vae_temporal.config", ())
        channels = temporal_config.embed_dim
        return cls(
            spatial=_read(
                SpatialVAEConfig, spatial.get("config"), "vae_2d.config", _DERIVED_SPATIAL_KEYS
            ),
            temporal=temporal_config,
            micro_frame_size=config.get("micro_frame_size"),
            micro_batch_size=spatial.get("micro_batch_size"),
            shift=_per_channel(config.get("shift", 0.0), channels),
            scale=_per_channel(config.get("scale", 1.0), channels),
        )

    def to_dict(self) -> dict[str, object]:
        """The same as JSON values, in the published layout with both parts' architecture written out."""
        return {
            "architectures": ["VideoAutoencoderPipeline"],
            "model_type": "VideoAutoencoderPipeline",
            "vae_2d": {
                "type": "VideoAutoencoderKL",
                "micro_batch_size": self.micro_batch_size,
                "config": asdict(self.spatial),
            },
            "vae_temporal": {"type": "VAE_Temporal", "config": asdict(self.temporal)},
            "micro_frame_size": self.micro_frame_size,
            "shift": list(self.shift),
            "scale": list(self.scale),
        }


# Keys of a diffusers AutoencoderKL configuration that follow from the rest or play no part here.
_DERIVED_SPATIAL_KEYS = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "down_block_types",
    "up_block_types",
    "force_upcast",
    "latents_mean",
    "latents_std",
    "scaling_factor",
    "shift_factor",
    "use_post_quant_conv",
    "use_quant_conv",
)


def _refuse_unknown(what: str, unknown: set[str]) -> None:
    if unknown:
        raise ValueError(f"unknown {what} config keys: {', '.join(sorted(unknown))}")


def _read(cls: type[Any], values: Mapping[str, Any] | None, what: str, ignored: tuple[str, ...]) -> Any:
    known = {item.name for item in fields(cls)}
    given = dict(values or {})
    _refuse_unknown(what, set(given) - known - set(ignored))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known})


def _per_channel(value: float | list[float] | tuple[float, ...], channels: int) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(float(entry) for entry in value)
    return (float(value),) * channels


class SpatialVAE(nn.Module):
    """A diffusers `AutoencoderKL`, applied to each frame of [B, C, T, H, W] on its own."""

    def __init__(self, config: SpatialVAEConfig, micro_batch_size: int | None) -> None:
        super().__init__()
        self.module = config.build()
        self.micro_batch_size = micro_batch_size

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames in [-1, 1] to 2-D latents: a sample if a generator is given, else the mean."""
        frames = x.transpose(1, 2).flatten(0, 1)
        latents = []
        for part in frames.split(self.micro_batch_size or frames.shape[0]):
            posterior = LatentDistribution.from_moments(self.module._encode(part))
            latents.append(posterior.mean if generator is None else posterior.sample(generator))
        encoded = torch.cat(latents) * SPATIAL_LATENT_FACTOR
        return encoded.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        """2-D latents to frames in about [-1, 1]."""
        frames = z.transpose(1, 2).flatten(0, 1) / SPATIAL_LATENT_FACTOR
        parts = frames.split(self.micro_batch_size or frames.shape[0])
        decoded = torch.cat([self.module.decode(part).sample for part in parts])
        return decoded.unflatten(0, (z.shape[0], -1)).transpose(1, 2)


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

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """(video frames, latent frames) of each micro-frame of a video."""
        if frames < 1:
            raise ValueError(f"a video needs at least one frame, got {frames}")
        size = self.config.micro_frame_size or frames
        sizes = [min(size, frames - start) for start in range(0, frames, size)]
        return [(count, self.temporal_vae.latent_frames(count)) for count in sizes]

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (t, h, w) of a video; a size that the 2-D VAE's factor does not divide is rounded down."""
        factor = self.config.spatial.factor
        return sum(latent for _, latent in self.chunks(frames)), height // factor, width // factor

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video in [-1, 1] to a normalised latent: drawn with `generator`, or the mean if there is none."""
        parts = []
        for part in x.to(self.dtype).split([frames for frames, _ in self.chunks(x.shape[2])], dim=2):
            posterior = self.temporal_vae.encode(self.spatial_vae.encode(part, generator))
            parts.append(posterior.mean if generator is None else posterior.sample(generator))
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Decode one micro-frame after the other: [B, 3, frames of it, H, W] each, about [-1, 1]."""
        chunks = self.chunks(num_frames)
        expected = sum(latent for _, latent in chunks)
        if z.shape[2] != expected:
            raise ValueError(f"{num_frames} frames have {expected} latent frames, got {z.shape[2]}")
        z = (z * self.scale + self.shift).to(self.dtype)
        parts = z.split([latent for _, latent in chunks], dim=2)
        for (frames, _), part in zip(chunks, parts, strict=True):
            yield self.spatial_vae.decode(self.temporal_vae.decode(part, frames))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Latent [B, C, t, h, w] to video [B, 3, num_frames, H, W]."""
        return torch.cat(list(self.decode_chunks(z, num_frames)), dim=2)
