"""Continuous batching with chunked prefill: which tokens of which sequences the next forward pass computes.

Sequences that decode take part in every pass with one token each, and beside them one chunk of fixed size of prompt
tokens, sliced and merged across prompts in the order of arrival (TetriInfer, section 3.3.3; the order of preemption is
vLLM's: who came last goes first, and is computed again later). Which tokens are meant is all a policy knows: how many a
sequence has, how many of them are computed, and how many blocks it holds.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SequenceArrived:
    """A sequence waits to be computed.

    Attributes:
        tokens: how many it has.
        most_tokens: how many it may come to have, those included.
        computed: of how many of them it brings the keys and values, and in how many blocks: then it need not wait.
    """

    sequence: str
    tokens: int
    most_tokens: int
    computed: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class SequenceLeft:
    """Somebody cancelled it; its blocks are free."""

    sequence: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The step is done: every sequence whose last token it computed has one more, but for those that are at their end.

    The blocks of sequences at their end are free.
    """

    ended: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StepDue:
    """The model has nothing to do. ``free_blocks`` are those that could be given out now."""

    free_blocks: int


Event = SequenceArrived | SequenceLeft | StepFinished | StepDue


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `start` + `count` of a sequence.

    Attributes:
        new_blocks: how many blocks to give it before.
        last: whether they are the last it has, so that the next token follows from them.
    """

    sequence: str
    start: int
    count: int
    new_blocks: int
    last: bool


@dataclass(frozen=True, slots=True)
class RunStep:
    """Compute these in one pass."""

    pieces: tuple[Piece, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class PreemptSequence:
    """Take its blocks; it will be computed again from its first token, those it has generated included."""

    sequence: str
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseSequence:
    """It can never be computed here."""

    sequence: str
    reason: str


Decision = RunStep | PreemptSequence | RefuseSequence


@dataclass(slots=True)
class _Sequence:
    name: str
    order: int
    tokens: int
    computed: int = 0
    blocks: int = 0

    @property
    def left(self) -> int:
        return self.tokens - self.computed

    def __lt__(self, other: "_Sequence") -> bool:
        return self.order < other.order


class ContinuousBatching:
    """One instance's batches.

    Args:
        blocks: how many the pool has.
        block_tokens: how many tokens one holds.
        chunk_tokens: at most so many prompt tokens a pass.
        most_sequences: at most so many sequences hold blocks at once.
    """

    def __init__(self, blocks: int, block_tokens: int = 16, chunk_tokens: int = 512, most_sequences: int = 256) -> None:
        if min(blocks, block_tokens, chunk_tokens, most_sequences) < 1:
            raise ValueError("blocks, their tokens, the chunk and the number of sequences are at least 1")
        self._pool_blocks = blocks
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._most_sequences = most_sequences
        self._sequences: dict[str, _Sequence] = {}
        # Both in the order of arrival.
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._computing: tuple[Piece, ...] = ()
        self._arrivals = 0
        self._handlers: dict[type[Any], Callable[[Any], list[Decision]]] = {
            SequenceArrived: self._arrived,
            SequenceLeft: self._left,
            StepFinished: self._finished,
            StepDue: self._due,
        }

    @property
    def waiting(self) -> int:
        """How many sequences hold no blocks."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def handle(self, event: Event, now_s: float) -> list[Decision]:
        """Take in one event; returns what to do, in order."""
        return self._handlers[type(event)](event)

    def _arrived(self, event: SequenceArrived) -> list[Decision]:
        if event.sequence in self._sequences:
            return []
        need = self._blocks_for(event.most_tokens)
        if need > self._pool_blocks:
            reason = f"{event.most_tokens} tokens take {need} blocks, the pool has {self._pool_blocks}"
            return [RefuseSequence(event.sequence, reason)]
        sequence = _Sequence(event.sequence, self._arrivals, event.tokens, event.computed, event.blocks)
        self._arrivals += 1
        self._sequences[event.sequence] = sequence
        (self._running if event.blocks else self._waiting).append(sequence)
        return []

    def _left(self, event: SequenceLeft) -> list[Decision]:
        sequence = self._sequences.pop(event.sequence, None)
        if sequence is not None:
            (self._running if sequence.blocks else self._waiting).remove(sequence)
        return []

    def _finished(self, event: StepFinished) -> list[Decision]:
        for piece in self._computing:
            sequence = self._sequences.get(piece.sequence)
            if sequence is None:
                continue
            sequence.computed += piece.count
            if piece.sequence in event.ended:
                self._left(SequenceLeft(piece.sequence))
            elif piece.last:
                sequence.tokens += 1
        self._computing = ()
        return []

    def _due(self, event: StepDue) -> list[Decision]:
        if self._computing:
            raise RuntimeError("a step is under way")
        decisions: list[Decision] = []
        pieces, free = self._continue_running(event.free_blocks, decisions)
        if not decisions:
            self._admit(pieces, free)
        if pieces:
            self._computing = tuple(pieces)
            tokens = sum(piece.count for piece in pieces)
            reason = f"{len(pieces)} of {len(self._sequences)} sequences, {tokens} tokens"
            decisions.append(RunStep(self._computing, reason))
        return decisions

    def _continue_running(self, free: int, decisions: list[Decision]) -> tuple[list[Piece], int]:
        """One token for each that decodes, in the order of arrival, and of the chunk what those before it leave."""
        pieces: list[Piece] = []
        room = self._chunk_tokens
        place = 0
        while place < len(self._running):
            sequence = self._running[place]
            # One that was adopted may have brought a block to spare.
            need = max(0, self._blocks_for(sequence.tokens) - sequence.blocks)
            while need > free and self._running[-1] is not sequence:
                free += self._preempt(self._running[-1], sequence.name, decisions)
            if need > free:
                free += self._preempt(sequence, sequence.name, decisions)
                break
            decodes = sequence.left == 1
            count = 1 if decodes else min(sequence.left, room)
            if count:
                pieces.append(self._piece(sequence, count, need))
                free -= need
                room -= 0 if decodes else count
            place += 1
        return pieces, free

    def _admit(self, pieces: list[Piece], free: int) -> None:
        """Who waits comes in, in the order of arrival, with blocks for all tokens it has; nobody overtakes."""
        room = self._chunk_tokens - sum(piece.count for piece in pieces if piece.count > 1 or not piece.last)
        while self._waiting and room > 0 and len(self._running) < self._most_sequences:
            sequence = self._waiting[0]
            need = self._blocks_for(sequence.tokens)
            if need > free:
                return
            del self._waiting[0]
            insort(self._running, sequence)
            count = min(sequence.left, room)
            pieces.append(self._piece(sequence, count, need))
            room -= count
            free -= need

    def _preempt(self, sequence: _Sequence, in_favour: str, decisions: list[Decision]) -> int:
        freed = sequence.blocks
        self._running.remove(sequence)
        sequence.computed = sequence.blocks = 0
        insort(self._waiting, sequence)
        reason = f"no block is left for {in_favour}; of those running it came last"
        decisions.append(PreemptSequence(sequence.name, reason))
        return freed

    def _piece(self, sequence: _Sequence, count: int, new_blocks: int) -> Piece:
        sequence.blocks += new_blocks
        return Piece(sequence.name, sequence.computed, count, new_blocks, count == sequence.left)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
