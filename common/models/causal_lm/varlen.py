"""Attention of packed chunks over paged keys and values on a GPU: one kernel call for all chunks of a layer.

NOT RUN YET on any device; ``make gpu-check`` is its test. torch's kernel reads pages in place only from 256 tokens a
page on (its second generation) or with a library of its own (the third); so the keys and values that a batch attends to
are gathered into one piece, once a layer.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from common.models.causal_lm.batch import Batch, Lengths
from common.models.causal_lm.errors import UnsupportedModelError
from common.models.causal_lm.paging import slots_of


def attend_packed(query: Tensor, layer: int, batch: Batch, scale: float, window: int) -> Tensor:
    """Every chunk over all positions up to its own, or over the last `window` of them.

    Args:
        query: [tokens, heads, head_dim], half precision.

    Returns:
        [tokens, heads * head_dim].
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(f"on a GPU models run in float16 or bfloat16, not in {query.dtype}: load it so")
    lengths = batch.lengths or _measure(batch)
    batch.lengths = lengths
    gathered = batch.pool.layers[layer].index_select(0, lengths.slots)
    out = varlen_attn(
        query,
        gathered[:, 0],
        gathered[:, 1],
        lengths.queries,
        lengths.keys,
        lengths.most_queries,
        lengths.most_keys,
        scale=scale,
        # The kernel's window counts the positions before a token, ours the token too.
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out.reshape(query.shape[0], -1)


def _measure(batch: Batch) -> Lengths:
    """Once for all layers; kernels leave out by themselves what is before the window."""
    queries, keys, slots = [0], [0], list[int]()
    for segment in batch.segments:
        slots += slots_of(segment.table.spans(0, segment.stop))
        queries.append(segment.end)
        keys.append(len(slots))
    device = batch.slots.device
    return Lengths(
        torch.tensor(queries, dtype=torch.int32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
        max(segment.end - segment.first for segment in batch.segments),
        max(segment.stop for segment in batch.segments),
        torch.tensor(slots, device=device),
    )
