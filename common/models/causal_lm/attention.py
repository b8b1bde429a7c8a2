"""Attention of packed chunks over paged keys and values.

Each chunk attends to the positions before it, read from the pool, and to itself. What lies in few runs of neighbouring
blocks is read in place, run by run; the parts are joined by their log-sum-exp (as in flash decoding). What is
scattered over many runs is gathered first. Single tokens of all sequences go through one call of the kernel in
``native`` where there is one. Grouped query heads share their keys without repeating them: the key-value
heads are the kernel's batch, the heads of a group its heads (or, for a single token, its rows).

On a GPU single tokens go through the kernel of ``gpu.kernels``, chunks of several through torch's flash attention
(``gpu.varlen``); what these do not compute, and single tokens where there is no Triton, takes the formula itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.causal_lm.batch import Batch, Segment
from common.models.causal_lm.gpu.kernels import gpu_kernels
from common.models.causal_lm.gpu.varlen import attend_packed, fits_packed, lengths_of, singles_of
from common.models.causal_lm.paging import slots_of

# Each run costs a kernel call, as much as gathering about this many tokens in place of it would.
_GATHER_TOKENS_PER_RUN = 192
_NO_WINDOW = 0

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights.

    Attributes:
        scale: factor of the scores.
        window: how many positions a token sees, itself included; 0: all before it.
        softcap: scores are squashed to at most this (Gemma 2); 0: they are not.
    """

    scale: float
    window: int = _NO_WINDOW
    softcap: float = 0.0


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, batch: Batch, scoring: Scoring) -> Tensor:
    """Attention of every chunk of a batch, whose keys and values have been written to the pool.

    Args:
        query: [tokens, heads, head_dim].
        key, value: [tokens, kv_heads, head_dim], of the batch's own tokens.

    Returns:
        [tokens, heads * head_dim].
    """
    if batch.stored is not None:
        batch.stored(layer)
    if query.is_cuda:
        return _on_gpu(query, layer, batch, scoring)
    pool = batch.pool.layers[layer]
    if len(batch.segments) == 1 and batch.kernels is None:
        return _attend_one(query, key, value, pool, batch.segments[0], scoring)
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    singles = batch.singles_within(scoring.window) if batch.kernels is not None and not scoring.softcap else None
    if batch.kernels is not None and singles is not None:
        batch.kernels.attend(query, pool, singles.rows, singles.spans, singles.first_span, out, scoring.scale)
    for segment in batch.segments:
        if singles is None or segment.count > 1:
            rows = slice(segment.first, segment.end)
            out[rows] = _attend_one(query[rows], key[rows], value[rows], pool, segment, scoring)
    return out


def _on_gpu(query: Tensor, layer: int, batch: Batch, scoring: Scoring) -> Tensor:
    """See ``attend``."""
    pool = batch.pool.layers[layer]
    kernels = gpu_kernels()
    if kernels is not None and batch.paged is None:
        batch.paged = singles_of(batch)
    paged = batch.paged
    more = (scoring.scale, scoring.window, scoring.softcap)
    if kernels is not None and paged is not None and paged.rows is None:
        return kernels.attend(query, pool, paged.positions, paged.tables, *more)
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    if kernels is not None and paged is not None:
        out[paged.rows] = kernels.attend(query[paged.rows], pool, paged.positions, paged.tables, *more)
    if fits_packed(query, scoring.softcap):
        batch.lengths = batch.lengths or lengths_of(batch, with_singles=paged is None)
        attend_packed(query, pool, batch.lengths, scoring.scale, scoring.window, out)
        return out
    for segment in batch.segments:
        if paged is None or segment.count > 1:
            rows = slice(segment.first, segment.end)
            out[rows] = _plainly(query[rows], pool, segment, scoring)
    return out


def _attend_one(query: Tensor, key: Tensor, value: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """One chunk's: [n, heads, head_dim] queries and [n, kv_heads, head_dim] keys and values of its own tokens."""
    if scoring.softcap:
        return _plainly(query, pool, segment, scoring)
    if segment.count == 1:
        return _one_token(query[0], pool, segment, scoring)
    if scoring.window and segment.stop > scoring.window:
        return _windowed(query, pool, segment, scoring)
    return _chunk(query, key, value, pool, segment, scoring)


def _one_token(query: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """One query [heads, head_dim] over everything it sees: [1, heads * head_dim].

    The kernel reads keys head by head. In half precision they are first copied in the order in which they lie, which
    made it up to twice as fast where they are not in the cache; in float32 it made it slower.
    """
    heads, head_dim = query.shape
    kv_heads = pool.shape[2]
    grouped = query.view(kv_heads, 1, heads // kv_heads, head_dim)
    low = max(0, segment.stop - scoring.window) if scoring.window else 0
    out: Tensor | None = None
    weight: Tensor | None = None
    for piece in _pieces(pool, segment, low, segment.stop, scoring.window):
        keys, values = _heads(piece if query.dtype is torch.float32 else piece.contiguous())
        part, part_weight = _flash(grouped, keys.unsqueeze(1), values.unsqueeze(1), scale=scoring.scale)
        out, weight = (part, part_weight) if out is None else _join(out, weight, part, part_weight)
    assert out is not None
    return out.reshape(1, heads * head_dim)


def _chunk(query: Tensor, key: Tensor, value: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """Queries [n, heads, head_dim] over all positions before them and, causally, over themselves."""
    grouped = _grouped(query, pool.shape[2])
    keys, values = _spread(key.transpose(0, 1), grouped), _spread(value.transpose(0, 1), grouped)
    out, weight = _flash(grouped, keys, values, is_causal=True, scale=scoring.scale)
    if segment.start:
        for piece in _pieces(pool, segment, 0, segment.start, scoring.window):
            before, values = _heads(piece)
            part = _flash(grouped, _spread(before, grouped), _spread(values, grouped), scale=scoring.scale)
            out, weight = _join(out, weight, *part)
    return _ungrouped(out)


def _windowed(query: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """Queries whose window leaves something out: one masked call over all that any of them sees."""
    grouped = _grouped(query, pool.shape[2])
    keys, values, mask = _seen(pool, segment, scoring.window, query.dtype)
    out, _ = _flash(grouped, _spread(keys, grouped), _spread(values, grouped), attn_mask=mask, scale=scoring.scale)
    return _ungrouped(out)


def _plainly(query: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """The formula itself, for what no kernel knows."""
    grouped = _grouped(query, pool.shape[2])
    keys, values, mask = _seen(pool, segment, scoring.window, query.dtype)
    scores = torch.matmul(grouped, keys.unsqueeze(1).transpose(2, 3)) * scoring.scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    weights = (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    return _ungrouped(torch.matmul(weights, values.unsqueeze(1)))


def _seen(pool: Tensor, segment: Segment, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of all positions that any token of the segment sees, and who sees which: [n, positions]."""
    low = max(0, segment.start - window + 1) if window else 0
    (piece,) = _pieces(pool, segment, low, segment.stop, window, whole=True)
    keys, values = _heads(piece)
    mask = segment.masks.get(window)
    if mask is None:
        own = torch.arange(segment.start, segment.stop, device=pool.device).unsqueeze(1)
        other = torch.arange(low, segment.stop, device=pool.device)
        unseen = other > own
        if window:
            unseen |= other <= own - window
        mask = torch.zeros(unseen.shape, dtype=dtype, device=pool.device).masked_fill_(unseen, float("-inf"))
        segment.masks[window] = mask
    return keys, values, mask


def _pieces(pool: Tensor, segment: Segment, low: int, high: int, window: int, whole: bool = False) -> list[Tensor]:
    """Keys and values [positions, 2, kv_heads, head_dim] of positions `low` to `high`, in one or several pieces."""
    spans = segment.spans.get(window)
    if spans is None:
        spans = segment.spans[window] = segment.table.spans(low, high)
    if len(spans) > 1 and (whole or len(spans) * _GATHER_TOKENS_PER_RUN > high - low):
        slots = segment.slots.get(window)
        if slots is None:
            slots = segment.slots[window] = torch.tensor(slots_of(spans), device=pool.device)
        return [pool.index_select(0, slots)]
    return [pool[first:end] for first, end in spans]


def _heads(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each [kv_heads, positions, head_dim]."""
    by_head = piece.transpose(0, 2)
    return by_head[:, 0], by_head[:, 1]


def _join(out: Tensor, weight: Tensor | None, other: Tensor, other_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two results of attention over different keys as one over all of them; weights are log-sum-exps of scores."""
    assert weight is not None
    share = torch.sigmoid(other_weight - weight).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, other, share), torch.logaddexp(weight, other_weight)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """[n, heads, head_dim] as [kv_heads, heads of a group, n, head_dim]."""
    tokens, heads, head_dim = query.shape
    return query.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)


def _spread(keys: Tensor, grouped: Tensor) -> Tensor:
    """[kv_heads, positions, head_dim] for every head of a group, without a copy."""
    return keys.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)


def _ungrouped(out: Tensor) -> Tensor:
    """[kv_heads, heads of a group, n, head_dim] as [n, heads * head_dim]."""
    kv_heads, group, tokens, head_dim = out.shape
    return out.permute(2, 0, 1, 3).reshape(tokens, kv_heads * group * head_dim)
