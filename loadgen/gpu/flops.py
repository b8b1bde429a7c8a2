"""Floating-point operations of one forward of STDiT3, by formula. A multiplication with its addition counts as two.

With b rows of T frames of S patches (N = T*S tokens), C channels, m the MLP's ratio and L text tokens, a block costs

    2*b*N*C^2 * (3 + 1 + 1 + 1 + 2*m)    linear layers: queries, keys and values, two projections, text queries, MLP
    4*b*N*S*C or 4*b*N*T*C               attention within frames, or within places
    4*b*N*L*C                            attention to the text

and a pair has one block of each kind. The text's keys and values are made once for a video and are not counted. Norms,
activations and rotations are left out: they cost time, but no matrix unit does them.
"""

import math
from dataclasses import dataclass

from common.models.opensora.stdit3 import STDiT3Config


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward, by part."""

    linear: int
    spatial_attention: int
    temporal_attention: int
    cross_attention: int
    ends: int

    @property
    def total(self) -> int:
        return self.linear + self.spatial_attention + self.temporal_attention + self.cross_attention + self.ends


def step_flops(config: STDiT3Config, batch: int, frames: int, patches: int, text_tokens: int) -> StepFlops:
    """batch: 2 for a guided step; frames, patches: of the token grid. The frame rate is one number for all rows."""
    channels, rows = config.hidden_size, batch * frames * patches
    layers = 6 + 2 * config.mlp_ratio
    patch = math.prod(config.patch_size)
    embedder = 2 * channels * (256 + channels)
    return StepFlops(
        linear=2 * config.depth * round(2 * rows * channels**2 * layers),
        spatial_attention=config.depth * 4 * rows * patches * channels,
        temporal_attention=config.depth * 4 * rows * frames * channels,
        cross_attention=2 * config.depth * 4 * rows * text_tokens * channels,
        ends=2 * rows * channels * patch * (config.in_channels + config.out_channels)
        + (batch + 1) * embedder
        + 12 * batch * channels**2,
    )
