"""Attention of chunks of several tokens on a GPU: one call of torch's flash attention for all chunks of a layer.

torch's kernel reads pages in place only from 256 tokens a page on (its second generation) or with a library of its own
(the third); so the keys and values that the chunks attend to are gathered into one piece, once a layer. For
chunks of 512 to 2,048 tokens of a prompt of 4,096 that is 5 to 2 % of a pass on an H200.
"""

import torch
from torch import Tensor

from common.models.causal_lm.batch import Batch, Lengths, Paged, Segment

# What torch.nn.attention.varlen calls, whose own interface changes from one version to the next.
_flash = torch.ops.aten._flash_attention_forward
_LARGEST_HEAD = 256


def fits_packed(query: Tensor, softcap: float) -> bool:
    """Whether the kernel computes this: [tokens, heads, head_dim] queries."""
    halves = query.dtype in (torch.float16, torch.bfloat16)
    return halves and not softcap and query.shape[2] % 8 == 0 and query.shape[2] <= _LARGEST_HEAD


def attend_packed(query: Tensor, pool: Tensor, lengths: Lengths, scale: float, window: int, out: Tensor) -> None:
    """Every chunk over all positions up to its own, or over the last `window` of them.

    Args:
        query: [tokens, heads, head_dim], half precision.
        pool: [slots, 2, kv_heads, head_dim], a layer of the pool.
        out: [tokens, heads * head_dim]; the rows that are meant are filled.
    """
    gathered = pool.index_select(0, lengths.slots)
    attended = _flash(
        query if lengths.rows is None else query.index_select(0, lengths.rows),
        gathered[:, 0],
        gathered[:, 1],
        lengths.queries,
        lengths.keys,
        lengths.most_queries,
        lengths.most_keys,
        0.0,
        window == 0,
        False,
        scale=scale,
        # The kernel's window counts the positions before a token, ours the token too.
        window_size_left=window - 1 if window else -1,
        window_size_right=0 if window else -1,
    )[0].flatten(1)
    if lengths.rows is None:
        out.copy_(attended)
    else:
        out.index_copy_(0, lengths.rows, attended)


def lengths_of(batch: Batch, with_singles: bool) -> Lengths:
    """Of the batch's chunks of several tokens, or of all. Kernels leave out by themselves what is before the window."""
    queries, keys, slots, rows = [0], [0], list[Tensor](), list[Tensor]()
    chosen = [segment for segment in batch.segments if with_singles or segment.count > 1]
    for segment in chosen:
        spans = segment.table.spans(0, segment.stop)
        slots += [torch.arange(first, end) for first, end in spans]
        rows.append(torch.arange(segment.first, segment.end))
        queries.append(queries[-1] + segment.count)
        keys.append(keys[-1] + segment.stop)
    device = batch.slots.device
    return Lengths(
        None if len(chosen) == len(batch.segments) else torch.cat(rows).to(device),
        torch.tensor(queries, dtype=torch.int32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
        max(segment.count for segment in chosen),
        max(segment.stop for segment in chosen),
        torch.cat(slots).to(device),
    )


def singles_of(batch: Batch) -> Paged | None:
    """The batch's chunks of one token; None if there are none."""
    chosen = [segment for segment in batch.segments if segment.count == 1]
    if not chosen:
        return None
    device = batch.slots.device
    rows = [segment.first for segment in chosen]
    chosen_rows = None if len(chosen) == len(batch.segments) else torch.tensor(rows, device=device)
    positions = batch.positions if chosen_rows is None else batch.positions[chosen_rows]
    return Paged(chosen_rows, positions, torch.tensor(padded(chosen), dtype=torch.int32, device=device))


def padded(segments: list[Segment]) -> list[list[int]]:
    """Each one's blocks, as many as the longest of them has."""
    most = max(len(segment.table.blocks) for segment in segments)
    return [segment.table.blocks + [0] * (most - len(segment.table.blocks)) for segment in segments]
