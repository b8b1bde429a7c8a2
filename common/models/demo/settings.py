"""The demo model's architecture and its training budgets: small sizes of the published Open-Sora 1.2 classes."""

from dataclasses import dataclass

from common.models.demo.loop import Budget
from common.models.opensora.stdit3 import STDiT3Config
from common.models.opensora.vae_config import OpenSoraVAEConfig, SpatialVAEConfig, TemporalVAEConfig

LATENT_CHANNELS = 16
SPATIAL_CHANNELS = 12
CAPTION_CHANNELS = 96
MAX_PROMPT_TOKENS = 64

VAE = OpenSoraVAEConfig(
    spatial=SpatialVAEConfig(
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=SPATIAL_CHANNELS,
        norm_num_groups=4,
    ),
    temporal=TemporalVAEConfig(
        in_out_channels=SPATIAL_CHANNELS,
        latent_embed_dim=LATENT_CHANNELS,
        embed_dim=LATENT_CHANNELS,
        filters=24,
        num_res_blocks=1,
        channel_multipliers=(1, 1, 2, 2),
        num_groups=4,
    ),
    micro_frame_size=16,
    micro_batch_size=None,
    shift=(0.0,) * LATENT_CHANNELS,
    scale=(1.0,) * LATENT_CHANNELS,
)

DIT = STDiT3Config(
    input_sq_size=512,
    in_channels=LATENT_CHANNELS,
    patch_size=(1, 2, 2),
    hidden_size=160,
    depth=3,
    num_heads=4,
    pred_sigma=False,
    caption_channels=CAPTION_CHANNELS,
    model_max_length=MAX_PROMPT_TOKENS,
)


@dataclass(frozen=True)
class Budgets:
    """What each stage may use; a stage's seconds are its ceiling on a slow machine, all together under 90 minutes."""

    spatial: Budget
    temporal: Budget
    joint: Budget
    dit: Budget
    clips_in_pool: int
    latent_share: float
    """Share of `dataset.BUCKETS`' clips that is encoded."""


FULL = Budgets(
    spatial=Budget(steps=2700, seconds=5.5 * 60),
    temporal=Budget(steps=3500, seconds=7 * 60),
    joint=Budget(steps=1300, seconds=7 * 60),
    dit=Budget(steps=11000, seconds=55 * 60),
    clips_in_pool=1200,
    latent_share=1.0,
)
