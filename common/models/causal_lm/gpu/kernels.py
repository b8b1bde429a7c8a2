"""Kernels of our own for a GPU, where Triton is (torch's builds for GPUs bring it); without it torch's do the work."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.models.causal_lm.paging import BLOCK_TOKENS

# Of tokens that a program of the attention kernel reads at once, and how it reads them.
_TILE, _WARPS, _STAGES = 64, 4, 3
_PROGRAMS_PER_PROCESSOR = 4
_MOST_SPLITS = 32
_HEADS_PER_PROGRAM = 8
_GATE_BLOCK = 1024
# The smallest side of a matrix that tensor cores take.
_SMALLEST_SIDE = 16


_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_pytorch_tanh"})


def knows_activation(name: str) -> bool:
    return name in _ACTIVATIONS


class GpuKernels:
    """Tensors are on one GPU and of one type where nothing else is said."""

    def __init__(self, sources: Any) -> None:
        self._sources = sources

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root mean square norm.

        Args:
            x: [rows, size], contiguous.
            weight: [size] float32, contiguous.
        """
        out = torch.empty_like(x)
        rows, size = x.shape
        block = _power_of_2(size)
        warps = min(16, max(1, block // 512))
        self._sources.norm_rows[(rows,)](x, weight, out, size, epsilon, BLOCK=block, num_warps=warps)
        return out

    def prepare(
        self,
        heads: Tensor,
        weight: Tensor | None,
        epsilon: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        pool: Tensor,
    ) -> None:
        """Norm and turn queries in place, and write normed and turned keys, and values, to the pool.

        Args:
            heads: [tokens, heads + 2 * kv_heads, head_dim], contiguous: queries, keys, values.
            weight: [heads + kv_heads, head_dim] float32, of the norm of each head; None: they are not normed.
            cos, sin: [tokens, head_dim / 2] float32, contiguous.
            slots: [tokens] int64; below 0: nothing is written.
            pool: [slots, 2, kv_heads, head_dim], a layer of the pool.
        """
        tokens, all_heads, dim = heads.shape
        kv_heads = pool.shape[2]
        self._sources.prepare_heads[(tokens, -(-all_heads // _HEADS_PER_PROGRAM))](
            heads,
            heads if weight is None else weight,
            epsilon,
            cos,
            sin,
            slots,
            pool,
            pool.stride(0),
            pool.stride(1),
            HEADS=all_heads - 2 * kv_heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            HALF_BLOCK=_power_of_2(dim // 2),
            SHARE=_HEADS_PER_PROGRAM,
            NORMED=weight is not None,
        )

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up.

        Args:
            gate_up: [rows, 2 * size], contiguous: gates, then ups.
            activation: silu, gelu or gelu_pytorch_tanh.
        """
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._sources.gate_rows[(rows, -(-size // _GATE_BLOCK))](
            gate_up, out, size, ACTIVATION=activation, BLOCK=_GATE_BLOCK
        )
        return out

    def attend(
        self,
        query: Tensor,
        pool: Tensor,
        positions: Tensor,
        tables: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention of single tokens of many sequences, each to its own position and all before it.

        Args:
            query: [sequences, heads, head_dim].
            pool: [slots, 2, kv_heads, head_dim], a layer of the pool.
            positions: [sequences] int64; below 0: padding, whose result is zeros.
            tables: [sequences, blocks] int32, each sequence's blocks in order.
            scale, window, softcap: see ``Scoring``.

        Returns:
            [sequences, heads * head_dim].
        """
        sequences, heads, dim = query.shape
        kv_heads = pool.shape[2]
        if query.stride(2) != 1 or query.stride(1) != dim:
            query = query.contiguous()
        splits = self._splits(sequences * kv_heads, query.device)
        out = query.new_empty(sequences, heads * dim)
        parts = out if splits == 1 else query.new_empty(sequences, heads, splits, dim, dtype=torch.float32)
        weights = out if splits == 1 else query.new_empty(sequences, heads, splits, dtype=torch.float32)
        dim_block = max(_SMALLEST_SIDE, _power_of_2(dim))
        self._sources.attend_part[(kv_heads, sequences, splits)](
            query,
            pool,
            positions,
            tables,
            parts,
            weights,
            scale,
            window,
            softcap,
            query.stride(0),
            tables.stride(0),
            pool.stride(0),
            pool.stride(1),
            SPLITS=splits,
            GROUP=heads // kv_heads,
            GROUP_BLOCK=max(_SMALLEST_SIDE, _power_of_2(heads // kv_heads)),
            DIM=dim,
            DIM_BLOCK=dim_block,
            TILE=_TILE,
            BLOCK_TOKENS=BLOCK_TOKENS,
            SOFTCAPPED=softcap > 0,
            PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        if splits > 1:
            self._sources.join_parts[(sequences * heads,)](
                parts, weights, out, SPLITS=splits, DIM=dim, DIM_BLOCK=dim_block, num_warps=2
            )
        return out

    @staticmethod
    def _splits(programs: int, device: torch.device) -> int:
        """So many parts that all processors of the card have work, a power of 2."""
        wanted = -(-_processors(device) * _PROGRAMS_PER_PROCESSOR // programs)
        return min(_MOST_SPLITS, _power_of_2(wanted))


@cache
def gpu_kernels() -> GpuKernels | None:
    """None where there is no Triton."""
    try:
        from common.models.causal_lm.gpu import sources
    except ImportError:
        return None
    return GpuKernels(sources)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _power_of_2(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << max(0, number - 1).bit_length()
