"""Continuous batching with chunked prefill: which tokens of which sequences the next forward pass computes.

Sequences that decode take part in every pass with one token each, and beside them one chunk of fixed size of prompt
tokens, sliced and merged across prompts in the order of arrival (TetriInfer, section 3.3.3; the order of preemption is
vLLM's: who came last goes first, and is computed again later). One goes at a time, and what that has freed is counted
by who keeps the blocks: where they are shared it is less than the sequence held. Which tokens are meant is all a policy
knows: how many a sequence has, how many of them are computed, and how many blocks it holds.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


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
    """The model has nothing to do. ``free_blocks`` are those that could be given out now.

    The answer is a step, nothing at all, or one sequence to preempt. Then ask again, with what is free after that:
    blocks that others share, or that are being read, do not become free with one holder less.
    """

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


class _Planned(NamedTuple):
    sequence: _Sequence
    tokens: int
    new_blocks: int


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
        planned: list[_Planned] = []
        free, room = event.free_blocks, self._chunk_tokens
        for sequence in self._running:
            # One that was adopted may have brought a block to spare.
            need = max(0, self._blocks_for(sequence.tokens) - sequence.blocks)
            if need > free:
                return [self._preempt(self._running[-1], sequence)]
            decodes = sequence.left == 1
            count = 1 if decodes else min(sequence.left, room)
            if count:
                planned.append(_Planned(sequence, count, need))
                free -= need
                room -= 0 if decodes else count
        planned += self._admit(free, room)
        if not planned:
            return []
        self._computing = tuple(self._piece(*plan) for plan in planned)
        tokens = sum(plan.tokens for plan in planned)
        return [RunStep(self._computing, f"{len(planned)} of {len(self._sequences)} sequences, {tokens} tokens")]

    def _admit(self, free: int, room: int) -> list[_Planned]:
        """Who waits comes in, in the order of arrival, with blocks for all tokens it has; nobody overtakes."""
        planned: list[_Planned] = []
        while self._waiting and room > 0 and len(self._running) < self._most_sequences:
            sequence = self._waiting[0]
            need = self._blocks_for(sequence.tokens)
            if need > free:
                break
            del self._waiting[0]
            insort(self._running, sequence)
            count = min(sequence.left, room)
            planned.append(_Planned(sequence, count, need))
            room -= count
            free -= need
        return planned

    def _preempt(self, sequence: _Sequence, in_favour: _Sequence) -> PreemptSequence:
        self._running.remove(sequence)
        sequence.computed = sequence.blocks = 0
        insort(self._waiting, sequence)
        return PreemptSequence(sequence.name, f"no block is left for {in_favour.name}; of those running it came last")

    def _piece(self, sequence: _Sequence, count: int, new_blocks: int) -> Piece:
        sequence.blocks += new_blocks
        return Piece(sequence.name, sequence.computed, count, new_blocks, count == sequence.left)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
