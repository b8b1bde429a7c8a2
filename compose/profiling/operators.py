"""Passes of a language model, timed for the costs of ``common.policies.language.language_costs``: prefill and decoding.

The constants are fitted to single passes: chunks of many sizes behind more or fewer cached tokens, and decoding batches
of many sizes and contexts. They are held to something else: whole prompts, chunk after chunk, and other batches, sizes
and contexts.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, Chunk, KVPool

_SMALLEST = 16
_LONGEST = 8192  # what of a long context is measured
_LARGEST_BATCH = 64
# After so many seconds there are no further rounds. A machine that is slow gets one, and no figure for its noise.
_ENOUGH_S = 15.0


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed. A prompt: its tokens and how many of them are cached. A decoding step: ``sequences`` of so many
    tokens each, the new one included."""

    tokens: int
    cached: int
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class Timed:
    work: Work
    seconds: float


def chunk_works(longest: int, chunk_tokens: int) -> list[Work]:
    """Single passes to fit to."""
    most = min(chunk_tokens, longest)
    sizes = [size for size in _doubled(_SMALLEST, most) if size < most] + [most]
    found = {
        Work(cached + size, cached)
        for size in sizes
        for cached in (0, longest // 4, longest // 2, longest - size)
        if cached + size <= longest
    }
    return sorted(found, key=lambda work: (work.tokens, work.cached))


def prompt_works(longest: int) -> list[Work]:
    """Whole prompts to hold the fit to."""
    lengths = [max(2, round(longest * share)) for share in (0.03, 0.1, 0.3, 0.6, 0.95)]
    return [Work(length, round(length * share)) for length in lengths for share in (0.0, 0.3, 0.7)]


def step_works(longest: int, room: int, held_out: bool = False) -> list[Work]:
    """Decoding steps to fit to, or to hold the fit to. ``room``: for how many tokens there is memory."""
    batches = (3, 6, 12, 24, 48) if held_out else tuple(_doubled(1, _LARGEST_BATCH))
    shares = (0.12, 0.4, 0.8) if held_out else (0.02, 0.25, 0.5, 0.97)
    contexts = [max(2, round(longest * share)) for share in shares]
    return [
        Work(context, context - 1, batch)
        for batch in batches
        for context in contexts
        if batch * (context + BLOCK_TOKENS) <= room
    ]


class Passes:
    """Runs works on a model. What lies in the pool does not matter: it takes as long to read zeros."""

    def __init__(self, model: CausalLM, pool: KVPool, chunk_tokens: int) -> None:
        self._model, self._pool, self.chunk_tokens = model, pool, chunk_tokens
        self.room = pool.blocks.shape[0] * BLOCK_TOKENS
        self.longest = min(_LONGEST, model.context, self.room)

    def timed(self, works: Sequence[Work], repeats: int, warm_up: int) -> list[Timed]:
        """The median of each.

        Rounds go over all of them, each in another order, so that a slow moment of the machine meets none alone.
        """
        times: list[list[float]] = [[] for _ in works]
        turns = [(self._passes(work), seconds) for work, seconds in zip(works, times, strict=True)]
        began_s = time.perf_counter()
        for number in range(warm_up + repeats):
            random.Random(number).shuffle(turns)
            for passes, seconds in turns:
                seconds.append(self._run(passes))
            if time.perf_counter() - began_s > _ENOUGH_S:
                break
        skip = min(warm_up, len(times[0]) - 1)
        return [Timed(work, statistics.median(own[skip:])) for work, own in zip(works, times, strict=True)]

    def _passes(self, work: Work) -> list[list[Chunk]]:
        """A prompt's chunks one after another; or a batch, all at once."""
        count = self._model.layout.blocks_for(work.tokens)
        tables = [BlockTable(range(number * count, (number + 1) * count)) for number in range(work.sequences)]
        starts = range(work.cached, work.tokens, self.chunk_tokens)
        return [
            [
                Chunk(f"sequence {number}", self._tokens(start, work.tokens), start, table)
                for number, table in enumerate(tables)
            ]
            for start in starts
        ]

    def _tokens(self, start: int, end: int) -> list[int]:
        return [place % self._model.vocabulary for place in range(start, min(end, start + self.chunk_tokens))]

    def _run(self, passes: Sequence[Sequence[Chunk]]) -> float:
        self._settle()
        began_s = time.perf_counter()
        for chunks in passes:
            self._model.forward(chunks, self._pool)
        self._settle()
        return time.perf_counter() - began_s

    def _settle(self) -> None:
        if self._pool.blocks.is_cuda:
            torch.cuda.synchronize(self._pool.blocks.device)


def _doubled(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found
