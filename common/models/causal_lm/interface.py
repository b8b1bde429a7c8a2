"""Our attention behind transformers' attention interface: any model that calls it runs over paged keys and values."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.models.causal_lm.attention import Scoring, attend
from common.models.causal_lm.batch import Batch
from common.models.causal_lm.errors import UnsupportedModelError

IMPLEMENTATION = "triptych_paged"

# Arguments that change the scores in ways we do not compute.
UNKNOWN = ("s_aux", "position_bias")


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Batch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Store the batch's keys and values, and attend. The signature is transformers' own.

    Args:
        query: [1, heads, tokens, head_dim], rotated.
        key, value: [1, kv_heads, tokens, head_dim], rotated.
        paged: the batch, as the caller of the model handed it in.

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    if paged is None:
        raise UnsupportedModelError(f"{type(module).__name__} did not hand the batch on to its attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    own = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    store(own[1], own[2], layer, paged)
    scoring = Scoring(scaling or query.shape[-1] ** -0.5, sliding_window or 0, softcap or 0.0)
    out = attend(*own, layer, paged, scoring)
    return out.view(1, query.shape[2], query.shape[1], query.shape[3]), None


def store(key: Tensor, value: Tensor, layer: int, batch: Batch) -> None:
    """Write [tokens, kv_heads, head_dim] of the batch's tokens to their slots."""
    pool = batch.pool.layers[layer]
    pool[:, 0].index_copy_(0, batch.slots, key)
    pool[:, 1].index_copy_(0, batch.slots, value)


def register() -> None:
    """Make the implementation known to transformers; doing it twice changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, paged_attention)


def use(model: nn.Module) -> None:
    """Have a transformers model attend through it."""
    register()
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
