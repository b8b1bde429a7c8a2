"""STDiT3's attention: self-attention over one axis with rotary positions, cross-attention to the prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.gpu.kernels import GpuKernels, gpu_kernels

_MAX_CACHED_TABLES = 64


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            # Sums are float32 inside: the bits are those of the conversions below, without their copies.
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864) over frames; neighbouring channels form the rotated pairs."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim
        self.freqs = nn.Parameter(1.0 / (10000**exponents), requires_grad=False)
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module._tables.clear())  # type: ignore[no-untyped-call]

    def forward(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [positions, head_dim] float32; the sines carry the sign of the rotation."""
        key = (positions, self.freqs.device, self.freqs.dtype)
        tables = self._tables.get(key)
        if tables is None:
            if len(self._tables) >= _MAX_CACHED_TABLES:
                self._tables.clear()
            # A table made inside inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                freqs = self.freqs.detach().clone().float()
                angles = torch.arange(positions, device=freqs.device, dtype=torch.float32)[:, None] * freqs
                angles = angles.repeat_interleave(2, dim=-1)
                sines = angles.sin()
                sines[:, ::2] *= -1
                tables = (angles.cos(), sines)
            self._tables[key] = tables
        return tables


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention in the values' precision; q, k, v: [..., N, head_dim]."""
    if v.dtype is torch.bfloat16 and v.device.type == "cpu" and torch.is_grad_enabled():
        # Its backward pass on a CPU takes six times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(v.dtype)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x [..., positions, head_dim] by the tables of `RotaryEmbedding`."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    swapped = torch.stack((pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return torch.addcmul(x * cosines, swapped, sines).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention over the last but one axis of [..., N, C], with normed queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, hidden_size * 3)
        self.q_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, temporal: bool, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend within frames (over S) or, if `temporal`, within places (over T).

        x is [B, T, S, C]; the result is [B, T, S, C]. `rope` turns queries and keys by their place on the axis.
        """
        batch, frames, patches, channels = x.shape
        qkv = self.qkv(x).view(batch, frames, patches, 3, self.num_heads, self.head_dim)
        kernels = gpu_kernels(qkv)
        attended = None if kernels is None else self._on_gpu(kernels, qkv, temporal, rope)
        if attended is not None:
            return self.proj(attended)  # type: ignore[no-any-return]
        # [3, B, outer, heads, N, head_dim], with the attended axis as N
        qkv = qkv.permute(3, 0, 2, 4, 1, 5) if temporal else qkv.permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(1, 2).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = attend(q, k, v)
        out = out.view(batch, -1, *out.shape[1:])
        out = out.permute(0, 3, 1, 2, 4) if temporal else out.permute(0, 1, 3, 2, 4)
        projected: Tensor = self.proj(out.reshape(batch, frames, patches, channels))
        return projected

    def _on_gpu(
        self, kernels: GpuKernels, qkv: Tensor, temporal: bool, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """Before the projection, [B, T, S, C], without copies of queries, keys and values; None: it does not fit."""
        queries, keys = self.q_norm, self.k_norm
        if not isinstance(queries, RMSNorm) or not isinstance(keys, RMSNorm):
            return None
        if temporal:
            if rope is None or not kernels.fits_places(qkv):
                return None
            return kernels.attend_places(qkv, queries.weight, keys.weight, queries.eps, rope)
        if rope is not None:
            return None
        kernels.norm_heads(qkv, queries.weight, keys.weight, queries.eps)
        # [B*T, heads, S, head_dim], as views
        q, k, v = (each.transpose(1, 2) for each in qkv.flatten(0, 1).unbind(2))
        return attend(q, k, v).transpose(1, 2).reshape(*qkv.shape[:3], -1)


class CrossAttention(nn.Module):
    """Attention of video tokens [B, N, C] to the prompt, whose keys and values are made once per prompt."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, hidden_size * 2)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, heads, L, head_dim], of embedded text [B, L, C]."""
        batch, length, _ = text.shape
        kv = self.kv_linear(text).view(batch, length, 2, self.num_heads, self.head_dim)
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` is bool [B, 1, 1, L], true where a text token counts; None where all count."""
        batch, length, channels = x.shape
        q = self.q_linear(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        out = attend(q, keys.to(q.dtype), values.to(q.dtype), mask)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, channels))
        return projected
