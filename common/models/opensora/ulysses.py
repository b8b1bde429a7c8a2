"""Ulysses (arXiv 2309.14509): attention whose tokens are shared out outside of it, and whose heads inside."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.attention import SelfAttention, rotate
from common.models.opensora.blocks import STDiT3Block
from common.models.opensora.sharding import Peers, reshard, shares


class UlyssesAttention(nn.Module):
    """A `SelfAttention` over the patches of a frame, of which every rank holds a share.

    One all-to-all trades this rank's tokens with all heads for all tokens with this rank's heads, a second one
    trades the result back.
    """

    def __init__(self, whole: SelfAttention, peers: Peers, patch_shares: list[int]) -> None:
        super().__init__()
        if whole.num_heads % peers.size:
            raise ValueError(
                f"Ulysses shares out whole heads: {whole.num_heads} heads do not divide by {peers.size} ranks; use dsp"
            )
        self.whole = whole
        self._peers = peers
        self._patch_shares = patch_shares
        self._head_shares = shares(whole.num_heads, peers.size)

    def forward(self, x: Tensor, temporal: bool, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As `SelfAttention.forward`, for x [B, T, own patches, C]; only within frames."""
        if temporal:
            raise ValueError("temporal attention needs no exchange: every rank holds all frames of its patches")
        whole, heads, patches = self.whole, self._head_shares, self._patch_shares
        batch, frames, own, channels = x.shape
        qkv = whole.qkv(x).view(batch, frames, own, 3, whole.num_heads, whole.head_dim)
        qkv = reshard(qkv, self._peers, split=4, split_shares=heads, join=2, join_shares=patches)
        # [B, T, S, 3, own heads, head_dim] to three of [B, T, own heads, S, head_dim]
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        q, k = whole.q_norm(q), whole.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (each.flatten(0, 1) for each in (q.to(v.dtype), k.to(v.dtype), v))
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.view(batch, frames, *out.shape[1:]).transpose(2, 3)
        out = reshard(out, self._peers, split=2, split_shares=patches, join=3, join_shares=heads)
        projected: Tensor = whole.proj(out.reshape(batch, frames, own, channels))
        return projected


def with_ulysses(block: STDiT3Block, peers: Peers, patch_shares: list[int]) -> STDiT3Block:
    """The same block, with the same weights, whose attention is shared out over the group."""
    twin = copy.copy(block)
    attention = UlyssesAttention(block.attn, peers, patch_shares)
    twin._modules = {**block._modules, "attn": attention}
    return twin
