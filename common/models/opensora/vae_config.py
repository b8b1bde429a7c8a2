"""The shape of Open-Sora 1.2's autoencoder, and the sizes that follow from it. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

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
# Keys of a diffusers AutoencoderKL configuration that follow from the rest or play no part here.
_DERIVED_SPATIAL_KEYS = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "down_block_types",
        "up_block_types",
        "force_upcast",
        "latents_mean",
        "latents_std",
        "sample_size",
        "scaling_factor",
        "shift_factor",
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
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Video pixels per latent pixel, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class TemporalVAEConfig:
    """The defaults are the published `VAE_Temporal_SD`."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample {self.temporal_downsample} needs one entry fewer than "
                f"channel_multipliers {self.channel_multipliers}"
            )

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame."""
        return int(2 ** sum(self.temporal_downsample))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of one chunk of video frames."""
        return -(-frames // self.time_factor)


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
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"the 2-D VAE has {self.spatial.latent_channels} latent channels, "
                f"the temporal VAE takes {self.temporal.in_out_channels}"
            )

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """(video frames, latent frames) of each micro-frame of a video."""
        if frames < 1:
            raise ValueError(f"a video needs at least one frame, got {frames}")
        size = self.micro_frame_size or frames
        sizes = [min(size, frames - start) for start in range(0, frames, size)]
        return [(count, self.temporal.latent_frames(count)) for count in sizes]

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (t, h, w) of a video; a size that the 2-D VAE's factor does not divide is rounded down."""
        factor = self.spatial.factor
        return sum(latent for _, latent in self.chunks(frames)), height // factor, width // factor

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "OpenSoraVAEConfig":
        """Read a published config.json, or ours, in which `vae_2d` and `vae_temporal` carry a `config` each.

        Raises ValueError naming every key it does not know.
        """
        own = {"vae_2d", "vae_temporal", "micro_frame_size", "shift", "scale"}
        _refuse_unknown("VAE", set(config) - own - _IGNORED_KEYS)
        spatial = dict(config.get("vae_2d") or {})
        temporal = dict(config.get("vae_temporal") or {})
        spatial_keys = {"type", "subfolder", "micro_batch_size", "config"}
        _refuse_unknown("VAE vae_2d", set(spatial) - spatial_keys - _IGNORED_KEYS)
        _refuse_unknown("VAE vae_temporal", set(temporal) - {"type", "config"} - _IGNORED_KEYS)
        temporal_config = _read(TemporalVAEConfig, temporal.get("config"), frozenset())
        return cls(
            spatial=_read_spatial(spatial.get("config")),
            temporal=temporal_config,
            micro_frame_size=config.get("micro_frame_size"),
            micro_batch_size=spatial.get("micro_batch_size"),
            shift=_per_channel(config.get("shift", 0.0), temporal_config.embed_dim),
            scale=_per_channel(config.get("scale", 1.0), temporal_config.embed_dim),
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


def _read_spatial(values: Mapping[str, Any] | None) -> SpatialVAEConfig:
    given = dict(values or {})
    for key, only in (("act_fn", "silu"), ("use_quant_conv", True), ("use_post_quant_conv", True)):
        if given.pop(key, only) != only:
            raise ValueError(f"vae_2d.config: only {key}={only!r} is supported")
    config: SpatialVAEConfig = _read(SpatialVAEConfig, given, _DERIVED_SPATIAL_KEYS)
    return config


def _read(cls: type[Any], values: Mapping[str, Any] | None, ignored: frozenset[str]) -> Any:
    known = {item.name for item in fields(cls)}
    given = dict(values or {})
    _refuse_unknown(cls.__name__, set(given) - known - ignored)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known})


def _refuse_unknown(what: str, unknown: set[str]) -> None:
    if unknown:
        raise ValueError(f"unknown {what} config keys: {', '.join(sorted(unknown))}")


def _per_channel(value: float | list[float] | tuple[float, ...], channels: int) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(float(entry) for entry in value)
    return (float(value),) * channels
