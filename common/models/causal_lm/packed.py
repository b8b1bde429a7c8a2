"""The decoder of ``fused`` in kernels of our own from end to end, for processors with AVX-512.

Weights are packed as the kernels read them (``cpp/products.h``). All layers are one call, in which a team of threads
goes from operation to operation together: called one by one, some seventy of them a pass cost more in waking threads
than a second thread gains.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from common.models.causal_lm.batch import Batch
from common.models.causal_lm.families import activation_of, head_norm_weight, norm_weight, taken, window_of
from common.models.causal_lm.native import DecoderKernels, LayerWeights, ModelShape, Pass

PANEL = 32
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2}


def can_pack(model: PreTrainedModel, kernels: DecoderKernels) -> bool:
    """Whether the kernels take this model's sizes: heads of whole vectors, inputs by pairs."""
    layer = model.model.layers[0]
    sizes = (layer.self_attn.q_proj.in_features, layer.self_attn.o_proj.in_features, layer.mlp.down_proj.in_features)
    return (
        activation_of(model.config) in _ACTIVATIONS
        and not any(size % kernels.pair for size in sizes)
        and layer.mlp.gate_proj.out_features % (PANEL // 2) == 0
    )


def pack(weight: Tensor, pair: int) -> Tensor:
    """[outputs, inputs] as the kernels read it: [panels, inputs / pair, 32, pair], filled up with zeros."""
    outputs, inputs = weight.shape
    filled = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    return filled.view(-1, PANEL, inputs // pair, pair).transpose(1, 2).contiguous()


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Outputs of two products such that each panel has sixteen of the one and then the same sixteen of the other."""
    half = PANEL // 2
    rest = gate.shape[1:]
    both = torch.stack((gate.view(-1, half, *rest), up.view(-1, half, *rest)), 1)
    return both.reshape(2 * gate.shape[0], *rest)


@dataclass(slots=True)
class _Buffers:
    """What lies between two products, for so many tokens."""

    normed: Tensor
    heads: Tensor
    attended: Tensor
    inner: Tensor


class PackedDecoder:
    """Packed chunks to logits; built from a transformers model, whose linear layers are empty afterwards.

    ``context`` is how many positions it knows.
    """

    def __init__(self, model: PreTrainedModel, kernels: DecoderKernels, context: int) -> None:
        inner, config = model.model, model.config
        attention = inner.layers[0].self_attn
        self._kernels = kernels
        self._embed = inner.embed_tokens
        self._heads, self._kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._head_dim, self._hidden = int(attention.head_dim), int(config.hidden_size)
        self._inner = int(inner.layers[0].mlp.gate_proj.out_features)
        self._scale: float = attention.scaling
        self._activation = _ACTIVATIONS[activation_of(config)]
        self._epsilon: float = config.rms_norm_eps
        self._windows = [window_of(layer.self_attn, config) for layer in inner.layers]
        self._vocabulary: int = config.vocab_size
        # The head first: its weight may be the embedding's, which stays.
        self._head = pack(model.lm_head.weight.detach(), kernels.pair)
        bias = model.lm_head.bias
        self._head_bias = None if bias is None else bias.detach().float()
        self._last_norm = norm_weight(inner.norm, config)
        self._cos, self._sin = _turns(inner.rotary_emb, context, inner.embed_tokens.weight.dtype)
        # What the kernels are told the addresses of.
        self._kept: list[Tensor] = []
        self._layers = (LayerWeights * len(inner.layers))(*(self._layer(layer, config) for layer in inner.layers))

    def __call__(self, batch: Batch) -> Tensor:
        """The logits wanted of the batch, [wanted, vocabulary] float32."""
        hidden: Tensor = self._embed(batch.input_ids)
        tokens = hidden.shape[0]
        buffers = _Buffers(
            hidden.new_empty(tokens, self._hidden),
            hidden.new_empty(tokens, self._heads + 2 * self._kv_heads, self._head_dim),
            hidden.new_empty(tokens, self._heads * self._head_dim),
            hidden.new_empty(tokens, self._inner),
        )
        self._run_layers(batch, self._pass(batch, hidden, buffers))
        if batch.wanted is not None:
            hidden = hidden.index_select(0, batch.wanted)
        if not hidden.shape[0]:
            return torch.empty(0, self._vocabulary)
        normed = self._kernels.norm(hidden, self._last_norm, self._epsilon)
        return self._kernels.product(normed, self._head, self._head_bias, self._vocabulary)

    def _run_layers(self, batch: Batch, done: Pass) -> None:
        """At once, but where somebody waits for each layer's keys and values."""
        shape = self._shape(batch)
        if batch.stored is None:
            self._kernels.run_layers(shape, self._layers, done)
            return
        for number in range(len(self._layers)):
            self._kernels.run_layers(shape, self._layers, done, range(number, number + 1))
            batch.stored(number)

    def _shape(self, batch: Batch) -> ModelShape:
        layer = batch.pool.layers[0]
        return ModelShape(
            hidden=self._hidden,
            inner=self._inner,
            query_heads=self._heads,
            key_heads=self._kv_heads,
            dim=self._head_dim,
            activation=self._activation,
            epsilon=self._epsilon,
            scale=self._scale,
            token_stride=layer.stride(0),
            layer_stride=2 * self._kv_heads * self._head_dim,
            value_offset=layer.stride(1),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
        )

    def _pass(self, batch: Batch, hidden: Tensor, buffers: _Buffers) -> Pass:
        runs = [batch.runs_within(window) for window in self._windows]
        addresses = ctypes.c_void_p * len(runs)
        return Pass(
            tokens=hidden.shape[0],
            chunks=len(batch.segments),
            chunk=runs[0].rows.data_ptr(),
            positions=batch.positions.data_ptr(),
            slots=batch.slots.data_ptr(),
            hidden=hidden.data_ptr(),
            normed=buffers.normed.data_ptr(),
            heads=buffers.heads.data_ptr(),
            attended=buffers.attended.data_ptr(),
            inner=buffers.inner.data_ptr(),
            pool=batch.pool.layers[0].data_ptr(),
            spans=addresses(*(one.spans.data_ptr() for one in runs)),
            first_span=addresses(*(one.first_span.data_ptr() for one in runs)),
        )

    def _layer(self, layer: Any, config: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = taken([attention.q_proj, attention.k_proj, attention.v_proj])
        out, out_bias = taken([attention.o_proj])
        (gate, gate_bias), (up, up_bias) = taken([mlp.gate_proj]), taken([mlp.up_proj])
        down, down_bias = taken([mlp.down_proj])
        return LayerWeights(
            window=window_of(attention, config),
            before=self._keep(norm_weight(layer.input_layernorm, config)),
            between=self._keep(norm_weight(layer.post_attention_layernorm, config)),
            heads=self._keep(head_norm_weight(attention, config)),
            qkv=self._packed(qkv),
            out=self._packed(out),
            gate_up=self._packed(interleave(gate, up)),
            down=self._packed(down),
            qkv_bias=self._bias(qkv_bias),
            out_bias=self._bias(out_bias),
            gate_up_bias=self._bias(None if gate_bias is None or up_bias is None else interleave(gate_bias, up_bias)),
            down_bias=self._bias(down_bias),
        )

    def _packed(self, weight: Tensor) -> int:
        return self._keep(pack(weight, self._kernels.pair)) or 0

    def _bias(self, bias: Tensor | None) -> int | None:
        return self._keep(None if bias is None else bias.float())

    def _keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor that lives as long as this."""
        if tensor is None:
            return None
        whole = tensor.contiguous()
        self._kept.append(whole)
        return whole.data_ptr()


def _turns(rotary: Any, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, as the model computes them: each [positions, head_dim / 2] float32."""
    example = torch.empty(0, dtype=dtype)
    cos, sin = rotary(example, torch.arange(positions).unsqueeze(0))
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
