"""The decoder of Llama and its close relatives on a GPU, in nine kernels a layer.

The same formula as in ``fused``, cut otherwise: gate and up are one product, residuals are added in place inside the
products that make them, and norms, rotation with storing, and activation are one kernel each.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from common.models.causal_lm.attention import Scoring, attend
from common.models.causal_lm.batch import Batch
from common.models.causal_lm.families import (
    activation_of,
    head_norm_weight,
    is_plain,
    norm_weight,
    taken,
    window_of,
)
from common.models.causal_lm.gpu.kernels import GpuKernels, knows_activation


def can_decode(model: PreTrainedModel) -> bool:
    """Whether the decoder here computes what this transformers model does."""
    return is_plain(model, "cuda") and knows_activation(activation_of(model.config))


class GpuDecoder:
    """Packed chunks to logits; built from a transformers model, whose weights it takes over layer by layer.

    It asks the GPU for no value, so that passes over single tokens can be captured (``graphs``).
    """

    def __init__(self, model: PreTrainedModel, kernels: GpuKernels) -> None:
        inner = model.model
        self._kernels = kernels
        self._head = model.lm_head
        self._vocabulary: int = model.config.vocab_size
        self._embed = inner.embed_tokens
        self._frequencies: Tensor = inner.rotary_emb.inv_freq.float()
        self._stretch: float = getattr(inner.rotary_emb, "attention_scaling", 1.0)
        self._layers = [_Layer(layer, index, model.config, kernels) for index, layer in enumerate(inner.layers)]
        self._norm = _Norm(inner.norm, model.config, kernels)

    def __call__(self, batch: Batch) -> Tensor:
        """The logits wanted of the batch, [wanted, vocabulary]."""
        hidden: Tensor = self._embed(batch.input_ids)
        angles = batch.positions.unsqueeze(1) * self._frequencies
        cos, sin = angles.cos() * self._stretch, angles.sin() * self._stretch
        for layer in self._layers:
            layer(hidden, cos, sin, batch)
        if batch.wanted is not None:
            hidden = hidden.index_select(0, batch.wanted)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._vocabulary)
        logits: Tensor = self._head(self._norm(hidden))
        return logits


class _Layer:
    def __init__(self, layer: Any, index: int, config: Any, kernels: GpuKernels) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._kernels = kernels
        self._head_dim: int = attention.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scoring = Scoring(attention.scaling, window_of(attention, config))
        self._before = _Norm(layer.input_layernorm, config, kernels)
        self._between = _Norm(layer.post_attention_layernorm, config, kernels)
        self._head_norm = head_norm_weight(attention, config)
        self._epsilon: float = config.rms_norm_eps
        self._activation = activation_of(config)
        self._qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _Product([attention.o_proj])
        self._gate_up = _Product([mlp.gate_proj, mlp.up_proj])
        self._down = _Product([mlp.down_proj])

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> None:
        """Changes hidden, [tokens, hidden size], in place."""
        heads = self._qkv(self._before(hidden)).view(hidden.shape[0], -1, self._head_dim)
        pool = batch.pool.layers[self._index]
        self._kernels.prepare(heads, self._head_norm, self._epsilon, cos, sin, batch.slots, pool)
        query = heads[:, : self._heads]
        key, value = heads[:, self._heads :].chunk(2, dim=1)
        self._out.add_to(hidden, attend(query, key, value, self._index, batch, self._scoring))
        gate_up = self._gate_up(self._between(hidden))
        self._down.add_to(hidden, self._kernels.gated(gate_up, self._activation))


class _Norm:
    """Root mean square norm."""

    def __init__(self, norm: Any, config: Any, kernels: GpuKernels) -> None:
        self._weight = norm_weight(norm, config)
        self._epsilon: float = config.rms_norm_eps
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.norm(x, self._weight, self._epsilon)


class _Product:
    """Linear layers over the same input as one; they are left empty."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._weight, self._bias = taken(modules)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += x W^T + b."""
        if self._bias is None:
            total.addmm_(x, self._weight.t())
        else:
            total.add_(self(x))
