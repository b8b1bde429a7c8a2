"""Decoding steps captured as CUDA graphs: one launch instead of hundreds, which take longer than a small batch's work.

A graph is of a fixed number of sequences; a batch takes the next larger one, filled up with rows that write nothing and
see nothing. Each is captured when it is first needed, in a fifth of a second.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.causal_lm.batch import Batch, Chunk, Paged, check
from common.models.causal_lm.paging import BLOCK_TOKENS, BlockTable, KVPool

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NO_POSITION = -1
_NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class _Captured:
    """inputs: [3, rows] int64, token ids, positions, slots; logits: [rows, vocabulary], what a replay fills."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class DecodeGraphs:
    """Passes over one token each of many sequences.

    Args:
        decode: computes a batch, asking the GPU for no value.
        context: how many positions the model knows.
    """

    def __init__(self, decode: Callable[[Batch], Tensor], context: int, device: torch.device) -> None:
        self._decode = decode
        self._context = context
        self._device = device
        self._pool: weakref.ref[KVPool] | None = None
        self._captured: dict[int, _Captured] = {}
        self._tables = torch.empty(0)
        self._known: list[tuple[BlockTable, int] | None] = []

    @staticmethod
    def fit(chunks: Sequence[Chunk]) -> bool:
        """Whether there is a graph for them: one token each, all of them with their logits, and not too many."""
        return 0 < len(chunks) <= _SIZES[-1] and all(len(chunk.tokens) == 1 and chunk.logits for chunk in chunks)

    def __call__(self, chunks: Sequence[Chunk], pool: KVPool) -> Tensor:
        """[chunks, vocabulary], to be used before the next call. Raises WrongChunkError."""
        for chunk in chunks:
            check(chunk, self._context)
        if self._pool is None or self._pool() is not pool:
            self._take(pool)
        size = next(size for size in _SIZES if size >= len(chunks))
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(size, pool)
        empty = size - len(chunks)
        inputs = [
            [chunk.tokens[0] for chunk in chunks] + [0] * empty,
            [chunk.start for chunk in chunks] + [_NO_POSITION] * empty,
            [chunk.table.slot(chunk.start) for chunk in chunks] + [_NO_SLOT] * empty,
        ]
        captured.inputs.copy_(torch.tensor(inputs))
        self._tell_tables([chunk.table for chunk in chunks])
        captured.graph.replay()
        return captured.logits[: len(chunks)]

    def _take(self, pool: KVPool) -> None:
        """Graphs read the pool where it was when they were captured."""
        self._captured.clear()
        self._pool = weakref.ref(pool)
        blocks = min(-(-self._context // BLOCK_TOKENS), pool.blocks.shape[0])
        self._tables = torch.zeros(_SIZES[-1], blocks, dtype=torch.int32, device=self._device)
        self._known = [None] * _SIZES[-1]

    def _tell_tables(self, tables: Sequence[BlockTable]) -> None:
        """Rows whose sequence is another one, or has more blocks than before."""
        changed = []
        for row, table in enumerate(tables):
            known = self._known[row]
            if known is None or known[0] is not table or known[1] != len(table.blocks):
                self._known[row] = (table, len(table.blocks))
                changed.append(row)
        if not changed:
            return
        # A table may have more blocks than the model has positions.
        width = min(max(len(tables[row].blocks) for row in changed), self._tables.shape[1])
        filled = [(tables[row].blocks + [0] * (width - len(tables[row].blocks)))[:width] for row in changed]
        rows = torch.tensor(changed, device=self._device)
        self._tables[:, :width].index_copy_(0, rows, torch.tensor(filled, dtype=torch.int32, device=self._device))

    def _capture(self, size: int, pool: KVPool) -> _Captured:
        inputs = torch.zeros(3, size, dtype=torch.int64, device=self._device)
        inputs[1], inputs[2] = _NO_POSITION, _NO_SLOT
        paged = Paged(None, inputs[1], self._tables[:size])
        batch = Batch(inputs[0], inputs[1], inputs[2], [], None, pool, paged=paged)
        # Once by itself, on another stream: kernels are compiled and libraries set up at their first call.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._decode(batch)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        memory = next(iter(self._captured.values())).graph.pool() if self._captured else None
        # Other threads, which move tensors, may go on meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = self._decode(batch)
        return _Captured(graph, inputs, logits)
