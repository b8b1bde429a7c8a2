"""Constants of cost models from measured times: least squares of relative errors, no constant below zero."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from common.policies.language.language_costs import ChunkedCost, FitError, pairs
from common.policies.language.prefill_cost import DecodeCost, LinkCost
from compose.profiling.operators import Timed

Numbers = npt.NDArray[np.float64]

# Passes that take less than so many times the floor are not taken for work.
_ABOVE_FLOOR = 1.15


def fit_chunks(timed: Sequence[Timed], chunk_tokens: int) -> ChunkedCost:
    """Of single passes.

    The floor is the one of the measured times, or none, with which all of them are met best.
    """
    seconds = np.array([one.seconds for one in timed])
    computed = np.array([one.work.tokens - one.work.cached for one in timed], dtype=float)
    looked = np.array([pairs(one.work.tokens - one.work.cached, one.work.cached) for one in timed])
    rows = np.stack([np.ones_like(computed), computed, looked], axis=1)
    best: tuple[float, ChunkedCost] | None = None
    for floor_s in (0.0, *np.unique(seconds)):
        above = seconds > _ABOVE_FLOOR * floor_s
        if above.sum() <= rows.shape[1]:
            break
        constants = no_less_than_zero(rows[above], seconds[above])
        missed = float(np.square(np.maximum(floor_s, rows @ constants) / seconds - 1).sum())
        if best is None or missed < best[0]:
            pass_s, token_s, pair_s = map(float, constants)
            best = missed, ChunkedCost(chunk_tokens, pass_s, token_s, pair_s, float(floor_s))
    assert best is not None
    return best[1]


def fit_steps(timed: Sequence[Timed]) -> DecodeCost:
    """Of decoding steps."""
    sequences = np.array([one.work.sequences for one in timed], dtype=float)
    contexts = sequences * np.array([one.work.tokens for one in timed])
    rows = np.stack([np.ones_like(sequences), sequences, contexts], axis=1)
    floor_s, sequence_s, context_token_s = no_less_than_zero(rows, np.array([one.seconds for one in timed]))
    return DecodeCost(float(floor_s), float(sequence_s), float(context_token_s))


def fit_link(sent: Sequence[tuple[int, float]]) -> LinkCost:
    """Of transfers, each by its bytes and seconds. One message does for all blocks that are neighbours."""
    size_bytes = np.array([size for size, _ in sent], dtype=float)
    rows = np.stack([np.ones_like(size_bytes), size_bytes], axis=1)
    once_s, byte_s = no_less_than_zero(rows, np.array([seconds for _, seconds in sent]))
    # A link whose bytes cost nothing that could be measured.
    return LinkCost(bytes_per_s=1 / max(float(byte_s), 1e-13), message_s=0.0, once_s=float(once_s))


def no_less_than_zero(rows: Numbers, seconds: Numbers) -> Numbers:
    """The constants, none negative, by which rows come nearest to seconds, as shares of these.

    Args:
        rows: [points, constants], with few constants: all ways to leave some out are tried.
        seconds: [points], all above 0.
    """
    weighed, ones = rows / seconds[:, None], np.ones_like(seconds)
    width = rows.shape[1]
    best, least = np.zeros(width), float(len(seconds))
    for count in range(1, width + 1):
        for kept in map(list, combinations(range(width), count)):
            found, *_ = np.linalg.lstsq(weighed[:, kept], ones, rcond=None)
            missed = float(np.square(weighed[:, kept] @ found - 1).sum())
            if (found >= 0).all() and missed < least:
                best, least = np.zeros(width), missed
                best[kept] = found
    return best


def error_of(predicted: Sequence[float], measured: Sequence[float]) -> FitError:
    """Neither is empty."""
    off = [abs(guess / seen - 1) for guess, seen in zip(predicted, measured, strict=True)]
    return FitError(sum(off) / len(off), max(off), len(off))
