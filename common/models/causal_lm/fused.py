"""The decoder of Llama and its close relatives in few operations, for CPUs, where each one costs microseconds.

A layer of Llama, Mistral, Qwen2, Qwen3 or Gemma is the same formula with small differences. Here it takes some fifteen
kernel calls instead of sixty: one product for queries, keys and values, one rotation of queries and keys together,
residuals and activations inside the products. Weights are laid out anew (see ``linear``), so a model runs either this
way or through transformers' own modules, not both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from common.models.causal_lm.attention import Scoring, attend
from common.models.causal_lm.batch import Batch
from common.models.causal_lm.interface import store
from common.models.causal_lm.linear import Linear, knows_activation

# Whose layers are exactly this formula, in the version of transformers that the constraints file names.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})

Norm = Callable[[Tensor], Tensor]


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the decoder here computes what this transformers model does."""
    return (
        model.config.model_type in FAMILIES
        and knows_activation(_activation(model.config))
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
    )


class FusedDecoder:
    """Packed chunks to logits; built from a transformers model, whose weights it copies layer by layer.

    The model's linear layers are empty afterwards, so that no weight is held twice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        inner = model.model
        plus_one = model.config.model_type == "gemma"
        # The head first: its weight may be the embedding's, which stays.
        self._head = Linear(model.lm_head.weight, model.lm_head.bias)
        self._vocabulary: int = model.config.vocab_size
        self._embed = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._layers = [_Layer(layer, index, model.config, plus_one) for index, layer in enumerate(inner.layers)]
        self._norm = _norm(inner.norm, plus_one)

    def __call__(self, batch: Batch) -> Tensor:
        """The logits wanted of the batch, [wanted, vocabulary]."""
        hidden: Tensor = self._embed(batch.input_ids)
        cos, sin = self._rotary(hidden.unsqueeze(0), batch.positions.unsqueeze(0))
        turn = _Turn(cos[0].unsqueeze(1), sin[0].unsqueeze(1))
        for layer in self._layers:
            hidden = layer(hidden, turn, batch)
        if batch.wanted is not None:
            hidden = hidden.index_select(0, batch.wanted)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._vocabulary)
        return self._head(self._norm(hidden))


class _Turn:
    """Rotary position embedding of [tokens, heads, head_dim]: the first half against the second."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos = cos
        self._half = cos.shape[-1] // 2
        self._sin = sin[..., : self._half]

    def __call__(self, x: Tensor) -> Tensor:
        half = self._half
        turned = x * self._cos
        turned[..., :half].addcmul_(x[..., half:], self._sin, value=-1)
        turned[..., half:].addcmul_(x[..., :half], self._sin)
        return turned


class _Layer:
    def __init__(self, layer: Any, index: int, config: Any, plus_one: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._head_dim: int = attention.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scoring = Scoring(attention.scaling, _window(attention, config))
        self._before = _norm(layer.input_layernorm, plus_one)
        self._between = _norm(layer.post_attention_layernorm, plus_one)
        self._head_norm = self._norm_of_heads(attention)
        self._qkv = _taken([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _taken([attention.o_proj])
        self._gate = _taken([mlp.gate_proj], _activation(config))
        self._up = _taken([mlp.up_proj])
        self._down = _taken([mlp.down_proj])

    def __call__(self, hidden: Tensor, turn: _Turn, batch: Batch) -> Tensor:
        rotated = self._heads + self._kv_heads
        heads = self._qkv(self._before(hidden)).view(hidden.shape[0], rotated + self._kv_heads, self._head_dim)
        turned = heads[:, :rotated]
        if self._head_norm is not None:
            turned = self._head_norm(turned)
        turned = turn(turned)
        query, key, value = turned[:, : self._heads], turned[:, self._heads :], heads[:, rotated:]
        store(key, value, self._index, batch)
        hidden = self._out.plus(attend(query, key, value, self._index, batch, self._scoring), hidden)
        normed = self._between(hidden)
        return self._down.plus(self._up.times(normed, self._gate.activated(normed)), hidden)

    def _norm_of_heads(self, attention: Any) -> Norm | None:
        """Qwen3: each head of queries and keys is normed by itself."""
        if not hasattr(attention, "q_norm"):
            return None
        weights = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._kv_heads
        weight, epsilon, shape = torch.stack(weights), attention.q_norm.variance_epsilon, (self._head_dim,)
        return lambda x: F.rms_norm(x, shape, eps=epsilon) * weight


def _norm(norm: Any, plus_one: bool) -> Norm:
    """Root mean square norm; Gemma's is by one plus its weight, in float32 throughout."""
    shape = tuple(norm.weight.shape)
    if not plus_one:
        weight, epsilon = norm.weight.detach(), norm.variance_epsilon
        return lambda x: F.rms_norm(x, shape, weight, epsilon)
    weight, epsilon = 1.0 + norm.weight.detach().float(), norm.eps
    return lambda x: F.rms_norm(x.float(), shape, weight, epsilon).to(x.dtype)


def _taken(modules: Sequence[Any], activation: str = "silu") -> Linear:
    """Linear layers over the same input as one; they are left empty."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    for module in modules:
        module.weight = None
    return Linear(weight, torch.cat(biases).detach() if biases else None, activation)


def _window(attention: Any, config: Any) -> int:
    """How many positions the layer sees, 0 for all: Mistral's is the model's, Qwen's each layer's own."""
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return window or 0


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
