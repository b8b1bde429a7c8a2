"""Llama and its close relatives, and the small differences between their layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Whose layers are exactly the formula of ``fused``, in the version of transformers that the constraints file names.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})


def is_plain(model: PreTrainedModel, device_type: str) -> bool:
    """Whether its layers are that formula, and all of it on devices of this type."""
    return (
        model.config.model_type in FAMILIES
        # Whole heads are turned, not parts of them.
        and 2 * model.model.rotary_emb.inv_freq.numel() == model.model.layers[0].self_attn.head_dim
        and all(parameter.device.type == device_type for parameter in model.parameters())
    )


def adds_one(config: Any) -> bool:
    """Gemma's norms are by one plus their weight."""
    return bool(config.model_type == "gemma")


def norm_weight(norm: Any, config: Any) -> Tensor:
    """What a norm of the model multiplies by, [size] float32."""
    weight: Tensor = norm.weight.detach().float()
    return 1.0 + weight if adds_one(config) else weight


def head_norm_weight(attention: Any, config: Any) -> Tensor | None:
    """Qwen3: each head of queries and keys is normed by itself. [heads + kv_heads, head_dim] float32."""
    if not hasattr(attention, "q_norm"):
        return None
    weights = [attention.q_norm.weight] * config.num_attention_heads
    weights += [attention.k_norm.weight] * config.num_key_value_heads
    return torch.stack(weights).float()


def taken(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers over the same input, as one layer; they are left empty: none is held twice."""
    weights = [module.weight.detach() for module in modules]
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    for module in modules:
        module.weight = None
    return torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None


def window_of(attention: Any, config: Any) -> int:
    """How many positions the layer sees, 0 for all: Mistral's is the model's, Qwen's each layer's own."""
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return window or 0


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
