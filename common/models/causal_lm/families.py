"""Llama and its close relatives, and the small differences between their layers."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# Whose layers are exactly the formula of ``fused``, in the version of transformers that the constraints file names.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})


def is_plain(model: PreTrainedModel) -> bool:
    """Whether its layers are that formula, and on a CPU."""
    return (
        model.config.model_type in FAMILIES
        # Whole heads are turned, not parts of them.
        and 2 * model.model.rotary_emb.inv_freq.numel() == model.model.layers[0].self_attn.head_dim
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
    )


def norm_weight(norm: Any, plus_one: bool) -> Tensor:
    """[size] float32; Gemma's norms are by one plus their weight."""
    weight: Tensor = norm.weight.detach().float()
    return 1.0 + weight if plus_one else weight


def window_of(attention: Any, config: Any) -> int:
    """How many positions the layer sees, 0 for all: Mistral's is the model's, Qwen's each layer's own."""
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return window or 0


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
