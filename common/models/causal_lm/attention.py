"""Attention of packed chunks over paged keys and values, on a CPU.

Each chunk attends to the positions before it, read from the pool, and to itself. What lies in few runs of neighbouring
blocks is read in place, run by run; the parts are joined by their log-sum-exp (as in flash decoding). What is
scattered over many runs is gathered first. Grouped query heads share their keys without repeating them: the key-value
heads are the kernel's batch, the heads of a group its heads (or, for a single token, its rows).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.causal_lm.batch import Batch, Segment
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
    pool = batch.pool.layers[layer]
    parts = []
    for segment in batch.segments:
        rows = slice(segment.first, segment.end)
        if scoring.softcap:
            part = _plainly(query[rows], pool, segment, scoring)
        elif segment.end - segment.first == 1:
            part = _one_token(query[segment.first], pool, segment, scoring)
        elif scoring.window and segment.stop > scoring.window:
            part = _windowed(query[rows], pool, segment, scoring)
        else:
            part = _chunk(query[rows], key[rows], value[rows], pool, segment, scoring)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_token(query: Tensor, pool: Tensor, segment: Segment, scoring: Scoring) -> Tensor:
    """One query [heads, head_dim] over everything it sees: [1, heads * head_dim]."""
    heads, head_dim = query.shape
    kv_heads = pool.shape[2]
    grouped = query.view(kv_heads, 1, heads // kv_heads, head_dim)
    low = max(0, segment.stop - scoring.window) if scoring.window else 0
    out: Tensor | None = None
    weight: Tensor | None = None
    for keys, values in _pieces(pool, segment, low, segment.stop, scoring.window):
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
        for before, values in _pieces(pool, segment, 0, segment.start, scoring.window):
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
    """The formula itself, for scores that no kernel knows."""
    grouped = _grouped(query, pool.shape[2])
    keys, values, mask = _seen(pool, segment, scoring.window, query.dtype)
    scores = torch.matmul(grouped, keys.unsqueeze(1).transpose(2, 3)) * scoring.scale
    scores = torch.tanh(scores / scoring.softcap) * scoring.softcap + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return _ungrouped(torch.matmul(weights, values.unsqueeze(1)))


def _seen(pool: Tensor, segment: Segment, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of all positions that any token of the segment sees, and who sees which: [n, positions]."""
    low = max(0, segment.start - window + 1) if window else 0
    ((keys, values),) = _pieces(pool, segment, low, segment.stop, window, whole=True)
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


def _pieces(
    pool: Tensor, segment: Segment, low: int, high: int, window: int, whole: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [kv_heads, positions, head_dim] of positions `low` to `high`, in one or several pieces."""
    spans = segment.spans.get(window)
    if spans is None:
        spans = segment.spans[window] = segment.table.spans(low, high)
    if len(spans) > 1 and (whole or len(spans) * _GATHER_TOKENS_PER_RUN > high - low):
        slots = segment.slots.get(window)
        if slots is None:
            slots = segment.slots[window] = torch.tensor(slots_of(spans), device=pool.device)
        gathered = [pool.index_select(0, slots)]
    else:
        gathered = [pool[first:end] for first, end in spans]
    return [(piece[:, 0].transpose(0, 1), piece[:, 1].transpose(0, 1)) for piece in gathered]


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
