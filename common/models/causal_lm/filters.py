"""Which tokens may be drawn: top-k, then top-p, then min-p, as in transformers.

What a row keeps, and in which order, depends on that row alone, equal scores included: rows of a batch are only put
together where the same is done to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sorting a whole vocabulary is slow; its likeliest tokens nearly always have all the probability that is asked for.
_FIRST_LOOK = 256

_EXCLUDED = float("-inf")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that some rows may draw.

    Attributes:
        rows: [n], which rows of the batch these are.
        scores: [n, candidates] logits, -inf for what is excluded.
        tokens: [n, candidates], whose they are; None: of every token in order.
    """

    rows: Tensor
    scores: Tensor
    tokens: Tensor | None


def keep_top(scores: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> list[Candidates]:
    """Exclude all but the likeliest tokens of each row.

    Args:
        scores: [rows, vocabulary] logits.
        top_k: at most so many; 0: all.
        top_p: the fewest that together have at least this probability; 1: all.
        min_p: those at least this share as likely as the likeliest; 0: all.

    Returns:
        Each row in exactly one of them.
    """
    vocabulary = scores.shape[1]
    limits = torch.tensor([min(k or vocabulary, vocabulary) for k in top_k], device=scores.device)
    shares = torch.tensor(top_p, dtype=torch.float64, device=scores.device)
    floors = torch.tensor(min_p, dtype=scores.dtype, device=scores.device).log()
    everything = (limits == vocabulary) & (shares >= 1)
    whole = ~everything & (limits > _FIRST_LOOK) & (shares >= 1)
    found: list[Candidates] = []
    if (rows := everything.nonzero().flatten()).numel():
        found.append(Candidates(rows, _likely_enough(scores[rows], floors[rows]), None))
    if (rows := (~everything & ~whole).nonzero().flatten()).numel():
        first, tokens = scores[rows].topk(min(_FIRST_LOOK, vocabulary), -1)
        kept, reached = _cut(first, scores[rows].logsumexp(-1), limits[rows], shares[rows])
        whole[rows] = ~reached
        kept = _likely_enough(kept, floors[rows])
        found.append(Candidates(rows[reached], kept[reached], tokens[reached]))
    if (rows := whole.nonzero().flatten()).numel():
        ordered, tokens = scores[rows].sort(-1, descending=True)
        kept, _ = _cut(ordered, scores[rows].logsumexp(-1), limits[rows], shares[rows])
        found.append(Candidates(rows, _likely_enough(kept, floors[rows]), tokens))
    return found


def _cut(ordered: Tensor, total: Tensor, limits: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k and top-p of rows whose scores are in falling order.

    Args:
        ordered: [rows, n], the first n.
        total: [rows], log-sum-exp of all of a row's scores.

    Returns:
        The scores, and for each row whether these n are enough to know what it keeps.
    """
    length = ordered.shape[1]
    places = torch.arange(length, device=ordered.device)
    kept = ordered.masked_fill(places >= limits.unsqueeze(1), _EXCLUDED)
    limited = limits <= length
    total = torch.where(limited, kept.logsumexp(-1), total)
    likely = (kept - total.unsqueeze(1)).double().exp()
    sums = likely.cumsum(-1)
    outside = (sums - likely >= shares.unsqueeze(1)) & (shares < 1).unsqueeze(1)
    outside[:, 0] = False
    return kept.masked_fill(outside, _EXCLUDED), limited | (sums[:, -1] >= shares)


def _likely_enough(scores: Tensor, floors: Tensor) -> Tensor:
    """Min-p; its floors are logarithms."""
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + floors.unsqueeze(1), _EXCLUDED)
