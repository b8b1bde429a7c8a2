"""One STDiT3 block (self-attention, cross-attention, MLP, all modulated by the timestep) and the last layer.

Tokens travel as [B, T*S, C], T frames of S patches. T and S are arguments of every block, not facts about the
model, so a group of workers can give the spatial blocks a share of T and the temporal blocks a share of S.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.attention import CrossAttention, SelfAttention
from common.models.opensora.embeddings import Mlp
from common.models.opensora.gpu.kernels import gpu_kernels


@dataclass(frozen=True)
class StepConditions:
    """What the blocks of one forward need of the timestep.

    embedding: [B, C], timestep and frame rate; modulation: [B, 6, C], the same after `t_block`.
    still_embedding, still_modulation: those of timestep 0, which the frames outside `frame_mask` get.
    frame_mask: bool [B, T], true for the frames that are denoised; None when all are.
    """

    embedding: Tensor
    modulation: Tensor
    still_embedding: Tensor | None = None
    still_modulation: Tensor | None = None
    frame_mask: Tensor | None = None

    def select(self, table: Tensor, moving: Tensor, still: Tensor | None) -> tuple[Tensor, ...]:
        """`table` [K, C] added to a condition [B, K or 1, C], as K tensors [B, T or 1, 1, C]."""
        params = (table + moving)[:, :, None, None]
        if self.frame_mask is not None and still is not None:
            mask = self.frame_mask[:, None, :, None, None]
            params = torch.where(mask, params, (table + still)[:, :, None, None])
        return params.unbind(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x [B, T, S, C] without its own weights, then scale and shift [B, T or 1, 1, C]."""
    kernels = gpu_kernels(x)
    if kernels is not None:
        return kernels.modulate(x.contiguous(), shift, scale)
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


def add_gated(x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """x + gate * added, [B, T, S, C]; gate: [B, T or 1, 1, C]."""
    kernels = gpu_kernels(x)
    if kernels is not None:
        return kernels.add(x.contiguous(), added, gate)
    return x + gate * added


def add_and_modulate(x: Tensor, added: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + added, and that modulated."""
    kernels = gpu_kernels(x)
    if kernels is not None:
        return kernels.add_and_modulate(x.contiguous(), added, shift, scale)
    total = x + added
    return total, modulate(total, shift, scale)


class STDiT3Block(nn.Module):
    """Spatial (attends within a frame) or temporal (attends within a place, with rotary positions)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        x: Tensor,
        text: tuple[Tensor, Tensor],
        text_mask: Tensor | None,
        conditions: StepConditions,
        frames: int,
        patches: int,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x: [B, frames*patches, C]; text: this block's keys and values of the prompt; result: shaped like x."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = conditions.select(
            self.scale_shift_table, conditions.modulation, conditions.still_modulation
        )
        tokens = x.view(x.shape[0], frames, patches, x.shape[2])
        attended = self.attn(modulate(tokens, shift_attn, scale_attn), self.temporal, rope)
        tokens = add_gated(tokens, attended, gate_attn)
        crossed = self.cross_attn(tokens.flatten(1, 2), text[0], text[1], text_mask).view(tokens.shape)
        tokens, modulated = add_and_modulate(tokens, crossed, shift_mlp, scale_mlp)
        return add_gated(tokens, self.mlp(modulated), gate_mlp).flatten(1, 2)


class FinalLayer(nn.Module):
    """Tokens [B, T*S, C] to patch values [B, T*S, patch_volume * C_out]."""

    def __init__(self, hidden_size: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_volume * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, conditions: StepConditions, frames: int, patches: int) -> Tensor:
        tokens = x.view(x.shape[0], frames, patches, -1)
        moving = (self.scale_shift_table + conditions.embedding[:, None])[:, :, None, None]
        out = modulate(tokens, moving[:, 0], moving[:, 1])
        if conditions.frame_mask is not None and conditions.still_embedding is not None:
            # The published definition norms the still frames after they were modulated as moving ones; its
            # checkpoints were trained with it.
            still = (self.scale_shift_table + conditions.still_embedding[:, None])[:, :, None, None]
            mask = conditions.frame_mask[:, :, None, None]
            out = torch.where(mask, out, modulate(out, still[:, 0], still[:, 1]))
        projected: Tensor = self.linear(out.flatten(1, 2))
        return projected
