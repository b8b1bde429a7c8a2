"""STDiT3 on a group of processes, each with all weights: sequence parallelism and guidance parallelism.

DSP, dynamic sequence parallelism (arXiv 2403.10266): a spatial block works on whole frames, so they are shared out
by frame; a temporal block on whole places, so they are shared out by patch; one all-to-all between two blocks
changes from one to the other, and attention itself needs no exchange.
Ulysses (arXiv 2309.14509): patches are shared out throughout; temporal blocks need no exchange, a spatial block's
attention trades tokens for heads and back.
Guidance parallelism: the conditional and the null half of a guided batch on one half of the ranks each. It needs no
exchange but the last, so it is spent before sequence parallelism.

The group is an argument of each forward, so the degree of parallelism can change between two steps (DDiT).
Every rank ends with the whole prediction, and so with the whole latent: leaving moves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from common.models.opensora.blocks import STDiT3Block, StepConditions
from common.models.opensora.sharding import Peers, Team, gather_padded, own_range, reshard, shares
from common.models.opensora.stdit3 import PreparedText, STDiT3, TokenGrid, float_value
from common.models.opensora.ulysses import with_ulysses

# The axes of tokens [B, T, S, C].
_FRAMES, _PATCHES = 1, 2


class SequenceParallelism(StrEnum):
    """How the tokens of one forward are shared out."""

    DSP = "dsp"
    ULYSSES = "ulysses"


@dataclass(frozen=True)
class Parallelism:
    """guidance: share out the two halves of a guided batch first, where the group's size is even."""

    sequence: SequenceParallelism = SequenceParallelism.DSP
    guidance: bool = True


@dataclass(frozen=True)
class _Forward:
    """What all blocks of one forward share: this rank's rows of the batch, and its team's shares of the axes."""

    text: PreparedText
    conditions: StepConditions
    grid: TokenGrid
    team: Peers
    frame_shares: list[int]
    patch_shares: list[int]

    @property
    def own_frames(self) -> slice:
        return own_range(self.frame_shares, self.team.rank)

    @property
    def own_patches(self) -> slice:
        return own_range(self.patch_shares, self.team.rank)


class ParallelSTDiT3:
    """Runs an STDiT3 on a group; predicts what the model alone predicts, up to the order of sums."""

    def __init__(self, model: STDiT3) -> None:
        self.model = model

    def on(self, peers: Peers, parallelism: Parallelism | None = None) -> Callable[..., Tensor]:
        """The model on that group: to be called like `STDiT3.forward`, by all members with equal arguments."""
        if peers.size == 1:
            return self.model
        chosen = parallelism or Parallelism()

        def forward(
            x: Tensor,
            timestep: Tensor,
            y: PreparedText,
            x_mask: Tensor | None = None,
            fps: Tensor | float | None = None,
            height: Tensor | float | None = None,
            width: Tensor | float | None = None,
        ) -> Tensor:
            if fps is None or height is None or width is None:
                raise ValueError("STDiT3 needs fps, height and width (pixels of the video, not of the latent)")
            size = (float_value(height), float_value(width))
            return self._forward(peers, chosen, x, timestep, y, x_mask, fps, size)

        return forward

    def _forward(
        self,
        peers: Peers,
        parallelism: Parallelism,
        x: Tensor,
        timestep: Tensor,
        text: PreparedText,
        x_mask: Tensor | None,
        fps: Tensor | float,
        size: tuple[float, float],
    ) -> Tensor:
        """x [B, C, T, H, W] to the prediction [B, C_out, T, H, W], float32, whole on every rank."""
        batch = x.shape[0]
        if text.batch != batch:
            raise ValueError(f"{batch} latents but {text.batch} prompts")
        halves = 2 if parallelism.guidance and batch % 2 == 0 and peers.size % 2 == 0 else 1
        team_size, rows_each = peers.size // halves, batch // halves
        half = peers.rank // team_size
        rows = slice(half * rows_each, (half + 1) * rows_each)
        if isinstance(fps, Tensor) and fps.numel() == batch:
            fps = fps.reshape(-1)[rows]
        tokens, grid = self.model.embed(x[rows], *size)
        forward = _Forward(
            text=text.rows(rows.start, rows.stop),
            conditions=self.model.conditions(timestep[rows], fps, None if x_mask is None else x_mask[rows]),
            grid=grid,
            team=peers if halves == 1 else Team(peers, half * team_size, team_size),
            frame_shares=shares(grid.frames, team_size),
            patch_shares=shares(grid.patches, team_size),
        )
        tokens = tokens.view(rows_each, grid.frames, grid.patches, -1)
        if parallelism.sequence is SequenceParallelism.DSP:
            tokens = self._run_dsp(tokens[:, forward.own_frames], forward)
        else:
            tokens = self._run_ulysses(tokens[:, :, forward.own_patches], forward)
        values = gather_padded(self._last(tokens, forward), peers, _PATCHES, forward.patch_shares * halves)
        teams = [torch.cat(values[first : first + team_size], _PATCHES) for first in range(0, peers.size, team_size)]
        return assemble(torch.cat(teams), grid, self.model.config.patch_size)

    def _run_dsp(self, tokens: Tensor, forward: _Forward) -> Tensor:
        """Tokens [B, own T, S, C] before the first block to [B, T, own S, C] after the last."""
        grid, team, text, conditions = forward.grid, forward.team, forward.text, forward.conditions
        frames, patches = forward.frame_shares, forward.patch_shares
        mask = conditions.frame_mask
        framewise = replace(conditions, frame_mask=None if mask is None else mask[:, forward.own_frames])
        rope = self.model.rope(grid.frames)
        for index, (spatial, temporal) in enumerate(self.model.block_pairs()):
            if index:
                tokens = reshard(tokens, team, _FRAMES, frames, _PATCHES, patches)
            # A rank may have no tokens (one frame, two ranks); it takes part in the exchanges all the same.
            if tokens.numel():
                tokens = _through(spatial, tokens, text.keys_values[2 * index], text.mask, framewise)
            tokens = reshard(tokens, team, _PATCHES, patches, _FRAMES, frames)
            if tokens.numel():
                tokens = _through(temporal, tokens, text.keys_values[2 * index + 1], text.mask, conditions, rope)
        return tokens

    def _run_ulysses(self, tokens: Tensor, forward: _Forward) -> Tensor:
        """Tokens [B, T, own S, C] before the first block to the same after the last."""
        text, conditions, team = forward.text, forward.conditions, forward.team
        rope = self.model.rope(forward.grid.frames)
        for index, (whole, temporal) in enumerate(self.model.block_pairs()):
            spatial = whole if team.size == 1 else with_ulysses(whole, team, forward.patch_shares)
            # Also without tokens of its own: a rank has its heads of everybody's.
            tokens = _through(spatial, tokens, text.keys_values[2 * index], text.mask, conditions)
            if tokens.numel():
                tokens = _through(temporal, tokens, text.keys_values[2 * index + 1], text.mask, conditions, rope)
        return tokens

    def _last(self, tokens: Tensor, forward: _Forward) -> Tensor:
        """Tokens [B, T, own S, C] to patch values [B, T, own S, patch_volume * C_out]."""
        batch, frames, patches, _ = tokens.shape
        layer = self.model.final_layer
        if not tokens.numel():
            return tokens.new_empty(batch, frames, 0, layer.linear.out_features)
        values: Tensor = layer(tokens.flatten(1, 2), forward.conditions, frames, patches)
        return values.view(batch, frames, patches, -1)


def _through(
    block: STDiT3Block,
    tokens: Tensor,
    prompt: tuple[Tensor, Tensor],
    mask: Tensor | None,
    conditions: StepConditions,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Tokens [B, T, S, C] through one block."""
    out: Tensor = block(tokens.flatten(1, 2), prompt, mask, conditions, tokens.shape[1], tokens.shape[2], rope)
    return out.view(tokens.shape)


def assemble(values: Tensor, grid: TokenGrid, patch_size: tuple[int, int, int]) -> Tensor:
    """Patch values [B, T, S, patch_volume * C_out] to a latent [B, C_out, T, H, W], float32, without the padding."""
    x = values.reshape(values.shape[0], grid.frames, grid.height, grid.width, *patch_size, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    frames, height, width = grid.latent_size
    return x[:, :, :frames, :height, :width].float()
