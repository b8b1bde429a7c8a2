"""Before a model is served: does all its attention use the interface, and what are its keys and values like?"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.models.causal_lm.errors import UnsupportedModelError
from common.models.causal_lm.interface import UNKNOWN
from common.models.causal_lm.paging import KVLayout

_IMPLEMENTATION = "triptych_probe"
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Rotary embeddings whose frequencies change with the longest sequence of a batch that is beyond training's length.
_STRETCHING = frozenset({"dynamic", "longrope"})
_REMEDY = "serve a causal LM with rotary attention in every layer, such as Llama, Qwen2, Qwen3, Mistral or Gemma"


@dataclass(slots=True)
class _Calls:
    """What the attention of each layer was called with: layer, keys' shape, values' shape."""

    seen: list[tuple[int, torch.Size, torch.Size]]


def layout_of(model: PreTrainedModel) -> KVLayout:
    """Run one token through the model and look at what its attention is given.

    Raises:
        UnsupportedModelError: a layer keeps other state or attends in another way; the message names the remedy.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        raise UnsupportedModelError(f"{name} has layers of {', '.join(sorted(kinds))}: {_REMEDY}")
    calls = _run(model, name)
    layers = [layer for layer, _, _ in calls.seen]
    if layers != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name} has {config.num_hidden_layers} layers, of which {layers} use the attention interface: {_REMEDY}"
        )
    shapes = {shape[1::2] for _, keys, values in calls.seen for shape in (keys, values)}
    if len(shapes) != 1:
        raise UnsupportedModelError(f"{name} has keys and values of several shapes {sorted(shapes)}: {_REMEDY}")
    kv_heads, head_dim = shapes.pop()
    return KVLayout(config.num_hidden_layers, kv_heads, head_dim, model.dtype)


def context_of(model: PreTrainedModel) -> int:
    """How many positions of a sequence the model computes the same way whatever else is in the batch."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _STRETCHING:
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(config.max_position_embeddings)


def _run(model: PreTrainedModel, name: str) -> _Calls:
    calls = _Calls([])

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, None]:
        if named.get("paged") is not calls:
            raise UnsupportedModelError(f"{name} does not hand on what its attention needs: {_REMEDY}")
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{name} attends to later tokens too: {_REMEDY}")
        unknown = [argument for argument in UNKNOWN if named.get(argument) is not None]
        if unknown:
            raise UnsupportedModelError(f"{name} attends with {unknown[0]}, which is not computed here: {_REMEDY}")
        calls.seen.append((int(module.layer_idx), key.shape, value.shape))  # type: ignore[arg-type]
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, record)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        with torch.inference_mode():
            model(input_ids=token, position_ids=token, use_cache=False, paged=calls, logits_to_keep=1)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(f"{name} cannot be run over paged attention ({error}): {_REMEDY}") from error
    return calls
