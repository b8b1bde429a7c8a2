"""Kernels of our own for a GPU, where Triton is (torch's builds for GPUs bring it) and no gradient is wanted."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

# Beyond this the frames of one place do not fit into a program's registers.
_MOST_FRAMES = 64
# The smallest side of a matrix that tensor cores take.
_SMALLEST_SIDE = 16
_GROUP_BLOCK = 8192
_EPSILON = 1e-6


class GpuKernels:
    """Tensors are on one GPU, contiguous and of one type where nothing else is said."""

    def __init__(self, sources: Any) -> None:
        self._sources = sources

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Layer norm of x [B, T, S, C] without weights, scaled by 1 + scale and shifted: each [B, T or 1, 1, C]."""
        _, normed = self._residual(x, None, None, shift, scale)
        assert normed is not None
        return normed

    def add(self, x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
        """x + gate * added, [B, T, S, C]; gate: [B, T or 1, 1, C]."""
        return self._residual(x, added, gate, None, None)[0]

    def add_and_modulate(self, x: Tensor, added: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and that modulated."""
        total, normed = self._residual(x, added, None, shift, scale)
        assert normed is not None
        return total, normed

    def _residual(
        self, x: Tensor, added: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, frames, patches, size = x.shape
        total = x if added is None else torch.empty_like(x)
        normed = None if shift is None else torch.empty_like(x)
        condition = gate if gate is not None else shift
        batch_stride, frame_stride = (0, 0) if condition is None else _condition_strides(condition)
        for other in (shift, scale):
            assert other is None or condition is None or _condition_strides(other) == (batch_stride, frame_stride)
        self._sources.residual_rows[(batch * frames * patches,)](
            x,
            x if added is None else added,
            x if gate is None else gate,
            x if shift is None else shift,
            x if scale is None else scale,
            total,
            x if normed is None else normed,
            size,
            patches,
            frames * patches,
            batch_stride,
            frame_stride,
            _EPSILON,
            ADDED=added is not None,
            GATED=gate is not None,
            NORMED=normed is not None,
            BLOCK=_power_of_2(size),
            num_warps=4,
        )
        return total, normed

    def norm_heads(self, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, epsilon: float) -> None:
        """Root mean square norm of queries and keys, head by head, in place: qkv [B, T, S, 3, heads, head_dim]."""
        heads, dim = qkv.shape[4:]
        self._sources.norm_heads[(qkv.numel() // (3 * heads * dim),)](
            qkv,
            query_weight,
            key_weight,
            epsilon,
            HEADS=heads,
            DIM=dim,
            ROWS_BLOCK=_power_of_2(2 * heads),
            DIM_BLOCK=_power_of_2(dim),
        )

    @staticmethod
    def fits_places(qkv: Tensor) -> bool:
        """Whether ``attend_places`` takes so many frames."""
        return qkv.shape[1] <= _MOST_FRAMES

    def attend_places(
        self,
        qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        epsilon: float,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention over the frames at each place, queries and keys normed and turned.

        Args:
            qkv: [B, T, S, 3, heads, head_dim].
            rope: see ``RotaryEmbedding``.

        Returns:
            [B, T, S, heads * head_dim].
        """
        batch, frames, patches, _, heads, dim = qkv.shape
        out = qkv.new_empty(batch, frames, patches, heads * dim)
        cos, sin = rope
        self._sources.attend_places[(heads, patches, batch)](
            qkv,
            query_weight,
            key_weight,
            cos,
            sin,
            out,
            epsilon,
            dim**-0.5,
            frames,
            patches,
            HEADS=heads,
            DIM=dim,
            FRAMES_BLOCK=max(_SMALLEST_SIDE, _power_of_2(frames)),
            DIM_BLOCK=max(_SMALLEST_SIDE, _power_of_2(dim)),
            PRECISION="ieee" if qkv.dtype is torch.float32 else "tf32",
            num_warps=1 if frames <= _SMALLEST_SIDE else 4,
        )
        return out

    def group_norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, silu: bool) -> Tensor:
        """Group norm of x [B, C, ...], and SiLU of it. torch's takes one block of threads for each whole group."""
        batch, channels = x.shape[:2]
        size = x.numel() // (batch * groups)
        parts = -(-size // _GROUP_BLOCK)
        means, spreads = (x.new_empty(batch * groups, parts, dtype=torch.float32) for _ in range(2))
        mean, factor = (x.new_empty(batch * groups, dtype=torch.float32) for _ in range(2))
        out = torch.empty_like(x)
        grid = (parts, batch * groups)
        self._sources.group_parts[grid](x, means, spreads, size, parts, BLOCK=_GROUP_BLOCK, num_warps=8)
        self._sources.group_moments[(batch * groups,)](
            means,
            spreads,
            mean,
            factor,
            size,
            parts,
            epsilon,
            BLOCK=_GROUP_BLOCK,
            PARTS_BLOCK=_power_of_2(parts),
        )
        each = channels // groups
        self._sources.group_rows[grid](
            x,
            weight,
            bias,
            mean,
            factor,
            out,
            size,
            size // each,
            groups,
            each,
            SILU=silu,
            BLOCK=_GROUP_BLOCK,
            num_warps=8,
        )
        return out


def gpu_kernels(x: Tensor) -> GpuKernels | None:
    """For work on this tensor; None on another device, with gradients, in a compiler, or where there is no Triton."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return _found()


@cache
def _found() -> GpuKernels | None:
    try:
        from common.models.opensora.gpu import sources
    except ImportError:
        return None
    return GpuKernels(sources)


def _condition_strides(condition: Tensor) -> tuple[int, int]:
    """From one row of the batch to the next, and from frame to frame, of [B, T or 1, 1, C]."""
    return condition.stride(0), condition.stride(1) if condition.shape[1] > 1 else 0


def _power_of_2(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << max(0, number - 1).bit_length()
