"""Prefill throughput by chunk size: in each pass a chunk of so many tokens, sliced and merged from prompts.

Sizes are doubled until that no longer helps.
"""

import statistics
import time
from collections.abc import Iterator

import torch

from common.models.causal_lm import BlockTable, CausalLM, Chunk, KVPool

_SMALLEST, _LARGEST = 16, 16384
# A prompt in the measured chunks is no longer than this, as in most workloads.
_PROMPT_TOKENS = 512
# Throughput has stopped rising where two doublings gained less than this.
_GAIN = 1.02
# No larger chunks where one takes so long: all that decode beside it would wait.
_LONG_S = 1.0


def measured(model: CausalLM, pool: KVPool, repeats: int, warm_up: int) -> dict[int, float]:
    """Tokens per second by chunk size."""
    rates: dict[int, float] = {}
    for size in _sizes(pool):
        chunks = _chunks(model, size)
        if sum(len(chunk.table.blocks) for chunk in chunks) > pool.blocks.shape[0]:
            break
        seconds = [_timed(model, chunks, pool) for _ in range(warm_up + repeats)][warm_up:]
        rates[size] = size / statistics.median(seconds)
        *_, third, second, last = [0.0, 0.0, *rates.values()]
        if max(second, last) < _GAIN * third or statistics.median(seconds) > _LONG_S:
            break
    return rates


def _sizes(pool: KVPool) -> Iterator[int]:
    size = _SMALLEST
    while size <= min(_LARGEST, pool.blocks.shape[0] * _SMALLEST):
        yield size
        size *= 2


def _chunks(model: CausalLM, size: int) -> list[Chunk]:
    """One pass of so many tokens: prompts one after another, each with blocks of its own."""
    longest = min(_PROMPT_TOKENS, model.context // 2)
    chunks: list[Chunk] = []
    block = left = 0
    for start in range(0, size, longest):
        left = min(longest, size - start)
        count = model.layout.blocks_for(left)
        tokens = [(start + place) % model.vocabulary for place in range(left)]
        chunks.append(Chunk(f"prompt {start}", tokens, 0, BlockTable(range(block, block + count))))
        block += count
    return chunks


def _timed(model: CausalLM, chunks: list[Chunk], pool: KVPool) -> float:
    _settle(pool)
    started_s = time.perf_counter()
    model.forward(chunks, pool)
    _settle(pool)
    return time.perf_counter() - started_s


def _settle(pool: KVPool) -> None:
    if pool.blocks.is_cuda:
        torch.cuda.synchronize(pool.blocks.device)
