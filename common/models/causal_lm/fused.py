"""The decoder of Llama and its close relatives in few operations, for CPUs, where each one costs microseconds.

A layer of Llama, Mistral, Qwen2, Qwen3 or Gemma is the same formula with small differences. Here it takes fifteen
kernel calls instead of sixty, or nine with kernels of our own: one product for queries, keys and values, one rotation
of queries and keys together, residuals and activations inside the products. Weights are laid out anew (see ``linear``),
so a model runs either this way or through transformers' own modules, not both.
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
from common.models.causal_lm.native import Kernels

# Whose layers are exactly this formula, in the version of transformers that the constraints file names.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})

Norm = Callable[[Tensor], Tensor]


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the decoder here computes what this transformers model does."""
    return (
        model.config.model_type in FAMILIES
        and knows_activation(activation_of(model.config))
        # Whole heads are turned, not parts of them.
        and 2 * model.model.rotary_emb.inv_freq.numel() == model.model.layers[0].self_attn.head_dim
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
    )


class FusedDecoder:
    """Packed chunks to logits; built from a transformers model, whose weights it copies layer by layer.

    The model's linear layers are empty afterwards, so that no weight is held twice.
    """

    def __init__(self, model: PreTrainedModel, kernels: Kernels | None) -> None:
        inner = model.model
        norms = _Norms(model.config.model_type == "gemma", kernels)
        # The head first: its weight may be the embedding's, which stays.
        self._head = Linear(model.lm_head.weight, model.lm_head.bias)
        self._vocabulary: int = model.config.vocab_size
        self._embed = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._layers = [_Layer(layer, index, model.config, norms) for index, layer in enumerate(inner.layers)]
        self._norm = norms.of(inner.norm)

    def __call__(self, batch: Batch) -> Tensor:
        """The logits wanted of the batch, [wanted, vocabulary]."""
        hidden: Tensor = self._embed(batch.input_ids)
        cos, sin = self._rotary(hidden.unsqueeze(0), batch.positions.unsqueeze(0))
        turn = _Turn(cos[0], sin[0])
        for layer in self._layers:
            hidden = layer(hidden, turn, batch)
        if batch.wanted is not None:
            hidden = hidden.index_select(0, batch.wanted)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self._vocabulary)
        return self._head(self._norm(hidden))


class _Turn:
    """Rotary position embedding: the first half of a head against the second.

    Args:
        cos, sin: [tokens, head_dim], both halves alike.

    Attributes:
        cos, sin: [tokens, head_dim / 2] float32.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._half = cos.shape[-1] // 2
        self._cos, self._sin = cos.unsqueeze(1), sin[:, : self._half].unsqueeze(1)
        self.cos, self.sin = (half[:, : self._half].float().contiguous() for half in (cos, sin))

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim], turned."""
        half = self._half
        turned = x * self._cos
        turned[..., :half].addcmul_(x[..., half:], self._sin, value=-1)
        turned[..., half:].addcmul_(x[..., :half], self._sin)
        return turned


class _Layer:
    def __init__(self, layer: Any, index: int, config: Any, norms: "_Norms") -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._head_dim: int = attention.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scoring = Scoring(attention.scaling, window_of(attention, config))
        self._before = norms.of(layer.input_layernorm)
        self._between = norms.of(layer.post_attention_layernorm)
        self._head_norm = self._weight_of_head_norm(attention)
        self._epsilon: float = config.rms_norm_eps
        self._qkv = _taken([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _taken([attention.o_proj])
        self._gate = _taken([mlp.gate_proj], activation_of(config))
        self._up = _taken([mlp.up_proj])
        self._down = _taken([mlp.down_proj])

    def __call__(self, hidden: Tensor, turn: _Turn, batch: Batch) -> Tensor:
        query, key, value = self._prepare(self._qkv(self._before(hidden)), turn, batch)
        hidden = self._out.plus(attend(query, key, value, self._index, batch, self._scoring), hidden)
        normed = self._between(hidden)
        return self._down.plus(self._up.times(normed, self._gate.activated(normed)), hidden)

    def _prepare(self, heads: Tensor, turn: _Turn, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normed and rotated; keys and values are in the pool then."""
        rotated = self._heads + self._kv_heads
        heads = heads.view(heads.shape[0], rotated + self._kv_heads, self._head_dim)
        turned = heads[:, :rotated]
        if batch.kernels is not None:
            pool = batch.pool.layers[self._index]
            batch.kernels.prepare(heads, self._head_norm, self._epsilon, turn.cos, turn.sin, batch.slots, pool)
        else:
            if self._head_norm is not None:
                turned = F.rms_norm(turned, turned.shape[2:], eps=self._epsilon) * self._head_norm.to(turned.dtype)
            turned = turn(turned)
            store(turned[:, self._heads :], heads[:, rotated:], self._index, batch)
        return turned[:, : self._heads], turned[:, self._heads :], heads[:, rotated:]

    def _weight_of_head_norm(self, attention: Any) -> Tensor | None:
        """Qwen3: each head of queries and keys is normed by itself. [heads + kv_heads, head_dim] float32."""
        if not hasattr(attention, "q_norm"):
            return None
        weights = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._kv_heads
        return torch.stack(weights).float()


class _Norms:
    """Root mean square norms; Gemma's are by one plus their weight, in float32 throughout."""

    def __init__(self, plus_one: bool, kernels: Kernels | None) -> None:
        self._plus_one = plus_one
        self._kernels = kernels

    def of(self, norm: Any) -> Norm:
        shape = tuple(norm.weight.shape)
        given = norm.weight.detach()
        epsilon: float = norm.eps if self._plus_one else norm.variance_epsilon
        weight = 1.0 + given.float() if self._plus_one else given.float()
        kernels = self._kernels
        if kernels is not None:
            return lambda x: kernels.norm(x, weight, epsilon)
        if self._plus_one:
            return lambda x: F.rms_norm(x.float(), shape, weight, epsilon).to(x.dtype)
        return lambda x: F.rms_norm(x, shape, given, epsilon)


def _taken(modules: Sequence[Any], activation: str = "silu") -> Linear:
    """Linear layers over the same input as one; they are left empty."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    for module in modules:
        module.weight = None
    return Linear(weight, torch.cat(biases).detach() if biases else None, activation)


def window_of(attention: Any, config: Any) -> int:
    """How many positions the layer sees, 0 for all: Mistral's is the model's, Qwen's each layer's own."""
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return window or 0


def activation_of(config: Any) -> str:
    """The name of the activation in the MLP."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
