"""The decoder of Llama and its close relatives in few operations, for CPUs, where each one costs microseconds.

A layer of Llama, Mistral, Qwen2, Qwen3 or Gemma is the same formula with small differences. Here it takes fifteen
kernel calls instead of sixty, or nine with kernels of our own: one product for queries, keys and values, one rotation
of queries and keys together, residuals and activations inside the products. Weights are laid out anew (see ``linear``),
so a model runs either this way or through transformers' own modules, not both.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from common.models.causal_lm.attention import Scoring, attend
from common.models.causal_lm.batch import Batch
from common.models.causal_lm.families import (
    activation_of,
    adds_one,
    head_norm_weight,
    is_plain,
    norm_weight,
    taken,
    window_of,
)
from common.models.causal_lm.interface import store
from common.models.causal_lm.linear import Linear, knows_activation
from common.models.causal_lm.native import Kernels

Norm = Callable[[Tensor], Tensor]


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the decoder here computes what this transformers model does."""
    return is_plain(model, "cpu") and knows_activation(activation_of(model.config))


class FusedDecoder:
    """Packed chunks to logits; built from a transformers model, whose weights it copies layer by layer.

    The model's linear layers are empty afterwards, so that no weight is held twice.
    """

    def __init__(self, model: PreTrainedModel, kernels: Kernels | None) -> None:
        inner = model.model
        norms = _Norms(model.config, kernels)
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
        self._head_norm = head_norm_weight(attention, config)
        self._epsilon: float = config.rms_norm_eps
        self._qkv = Linear(*taken([attention.q_proj, attention.k_proj, attention.v_proj]))
        self._out = Linear(*taken([attention.o_proj]))
        self._gate = Linear(*taken([mlp.gate_proj]), activation_of(config))
        self._up = Linear(*taken([mlp.up_proj]))
        self._down = Linear(*taken([mlp.down_proj]))

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


class _Norms:
    """Root mean square norms; those that add one to their weight are in float32 throughout."""

    def __init__(self, config: Any, kernels: Kernels | None) -> None:
        self._config = config
        self._kernels = kernels

    def of(self, norm: Any) -> Norm:
        shape = tuple(norm.weight.shape)
        given = norm.weight.detach()
        epsilon: float = self._config.rms_norm_eps
        weight = norm_weight(norm, self._config)
        kernels = self._kernels
        if kernels is not None:
            return lambda x: kernels.norm(x, weight, epsilon)
        if adds_one(self._config):
            return lambda x: F.rms_norm(x.float(), shape, weight, epsilon).to(x.dtype)
        return lambda x: F.rms_norm(x, shape, given, epsilon)
