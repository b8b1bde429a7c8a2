"""Continuous batching with chunked prefill: which tokens of which sequences the next forward pass computes.

Sequences that decode take part in every pass with one token each, and beside them one chunk of fixed size of prompt
tokens, sliced and merged across prompts (TetriInfer, section 3.3.3) in the order that ``PrefillSchedule`` gives. Who
comes in, and who leaves where there is no room, says ``DecodeAdmission``. Without either it is vLLM's way: in the order
of arrival, as long as there are blocks; who came last leaves first. Who left is computed again later. One leaves at a
time, and what that freed is counted by who keeps the blocks: with shared ones it is less than the sequence held. Which
tokens are meant is all a policy knows: how many a sequence has, how many of them are computed, and how many blocks it
holds.

With fixed batches it is what TetriInfer is compared with (section 5.1), and what engines did before continuous ones: as
many as fit and are allowed come in, their prompts are computed first, and nobody else comes in until the last answer
of the batch is at its end. Who is preempted has left the batch.
"""

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.policies.language.batching_events import (
    CachedPrefix,
    Decision,
    Event,
    LengthPredicted,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    SequenceComing,
    SequenceLeft,
    StepDue,
    StepFinished,
)
from common.policies.language.decode_admission import DecodeAdmission
from common.policies.language.prefill_schedule import PrefillSchedule

_NOTHING_CACHED = CachedPrefix()


@dataclass(slots=True)
class _Sequence:
    name: str
    order: int
    arrived_s: float
    tokens: int
    computed: int
    blocks: int
    expected_tokens: int
    # Whether the schedule has it: it is more than one token behind, or waits.
    scheduled: bool = False

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
        alone_tokens: at most so many prompt tokens a pass where only one prompt waits: slicing lets others in between,
            and there are none (0: ``chunk_tokens``).
        schedule: in which order prompts are computed; its own, as it keeps books of them (None: of arrival).
        admission: who may hold blocks (None: whoever comes, as long as there are any).
        fixed: whether batches are fixed, of ``most_sequences`` each. Who brings blocks is in whatever batch there is.
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int = 16,
        chunk_tokens: int = 512,
        most_sequences: int = 256,
        alone_tokens: int = 0,
        schedule: PrefillSchedule | None = None,
        admission: DecodeAdmission | None = None,
        fixed: bool = False,
    ) -> None:
        if min(blocks, block_tokens, chunk_tokens, most_sequences) < 1:
            raise ValueError("blocks, their tokens, the chunk and the number of sequences are at least 1")
        self._pool_blocks = blocks
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._most_sequences = most_sequences
        self._alone_tokens = max(chunk_tokens, alone_tokens)
        self._schedule = PrefillSchedule() if schedule is None else schedule
        self._admission = DecodeAdmission() if admission is None else admission
        self._fixed = fixed
        # Whether prompts may join those that run.
        self._open = True
        self._sequences: dict[str, _Sequence] = {}
        # Who holds blocks, in the order of arrival.
        self._running: list[_Sequence] = []
        # Who has blocks, and is not here yet.
        self._coming: dict[str, _Sequence] = {}
        self._computing: tuple[Piece, ...] = ()
        self._arrivals = 0
        self._handlers: dict[type[Any], Callable[[Any, float], list[Decision]]] = {
            SequenceArrived: self._arrived,
            SequenceComing: self._comes,
            LengthPredicted: self._predicted,
            SequenceLeft: self._left,
            StepFinished: self._finished,
            StepDue: self._due,
        }

    @property
    def waiting(self) -> int:
        """How many sequences hold no blocks."""
        return len(self._sequences) - len(self._running)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens wait to be computed before their sequences can go on."""
        return self._schedule.tokens

    def handle(self, event: Event, now_s: float) -> list[Decision]:
        """Take in one event; returns what to do, in order."""
        return self._handlers[type(event)](event, now_s)

    def refusal(self, tokens: int, expected_tokens: int, free_blocks: int) -> str | None:
        """Why no blocks may be set aside now for a sequence that is to be handed over to here; None: they may.

        Args:
            tokens: how many it will have when it arrives.
            expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.
            free_blocks: how many could be given out now, and those of its own that others hold.
        """
        return self._refused(_Sequence("", self._arrivals, 0.0, tokens, 0, 0, expected_tokens), free_blocks)

    def _arrived(self, event: SequenceArrived, now_s: float) -> list[Decision]:
        if event.sequence in self._sequences:
            return []
        need = self._blocks_for(event.most_tokens)
        if need > self._pool_blocks:
            reason = f"{event.most_tokens} tokens take {need} blocks, the pool has {self._pool_blocks}"
            return [RefuseSequence(event.sequence, reason)]
        sequence = _Sequence(
            event.sequence, self._arrivals, now_s, event.tokens, event.computed, event.blocks, event.expected_tokens
        )
        self._arrivals += 1
        self._sequences[event.sequence] = sequence
        if event.blocks:
            self._running.append(sequence)
        if not event.blocks or sequence.left > 1:
            self._schedule_again(sequence)
        return []

    def _comes(self, event: SequenceComing, now_s: float) -> list[Decision]:
        coming = _Sequence(event.sequence, self._arrivals, now_s, event.tokens, 0, 0, event.expected_tokens)
        self._coming[event.sequence] = coming
        return []

    def _predicted(self, event: LengthPredicted, now_s: float) -> list[Decision]:
        if event.sequence in self._sequences:
            self._sequences[event.sequence].expected_tokens = event.expected_tokens
        return []

    def _left(self, event: SequenceLeft, now_s: float) -> list[Decision]:
        self._coming.pop(event.sequence, None)
        sequence = self._sequences.pop(event.sequence, None)
        if sequence is not None:
            self._schedule.remove(event.sequence)
            if sequence.blocks:
                self._running.remove(sequence)
        return []

    def _finished(self, event: StepFinished, now_s: float) -> list[Decision]:
        for piece in self._computing:
            sequence = self._sequences.get(piece.sequence)
            if sequence is None:
                continue
            sequence.computed += piece.count
            if piece.sequence in event.ended:
                self._left(SequenceLeft(piece.sequence), now_s)
            elif piece.last:
                sequence.tokens += 1
        self._computing = ()
        return []

    def _due(self, event: StepDue, now_s: float) -> list[Decision]:
        if self._computing:
            raise RuntimeError("a step is under way")
        self._open = self._open or not self._running
        decoding: list[_Planned] = []
        free = event.free_blocks
        for sequence in self._running:
            need = self._need(sequence)
            if need > free:
                return [self._preempt(sequence)]
            free -= need  # also for those whose turn in the chunk has not come yet
            if not sequence.scheduled:
                decoding.append(_Planned(sequence, 1, need))
        planned = self._pass(decoding, self._chunk(free, event.cached))
        if not planned:
            return []
        self._computing = tuple(self._piece(*plan) for plan in planned)
        tokens = sum(plan.tokens for plan in planned)
        return [RunStep(self._computing, f"{len(planned)} of {len(self._sequences)} sequences, {tokens} tokens")]

    def _pass(self, decoding: list[_Planned], prompts: list[_Planned]) -> list[_Planned]:
        """Everything in one pass, or the prompts of a fixed batch first. Once it decodes, nobody joins it."""
        if not self._fixed:
            return decoding + prompts
        self._open = self._open and bool(prompts)
        return prompts or decoding

    def _chunk(self, free: int, cached: Mapping[str, CachedPrefix]) -> list[_Planned]:
        """Prompts in the schedule's order, with blocks for all tokens they have; nobody overtakes one that must wait,
        but those go on that hold blocks already, lest it waits for ever.
        """
        planned: list[_Planned] = []
        room = self._alone_tokens if len(self._schedule) == 1 else self._chunk_tokens
        while room > 0 and (name := self._schedule.head(bool(planned))) is not None:
            sequence = self._sequences[name]
            if not sequence.blocks:
                prefix = cached.get(name, _NOTHING_CACHED)
                may_share = free + prefix.held_blocks
                if self._full or prefix.awaited or self._refused(sequence, may_share) is not None:
                    return planned + self._go_on(room, planned)
                insort(self._running, sequence)
                free += prefix.held_blocks - self._need(sequence)
                self._share(sequence, prefix.tokens)
            planned.append(self._take(sequence, room))
            room -= planned[-1].tokens
        return planned

    def _go_on(self, room: int, planned: list[_Planned]) -> list[_Planned]:
        """What those with blocks and a prompt left can make of the room."""
        more: list[_Planned] = []
        for sequence in [one for one in self._running if one.scheduled]:
            if room > 0 and all(sequence is not plan.sequence for plan in planned):
                more.append(self._take(sequence, room))
                room -= more[-1].tokens
        return more

    def _take(self, sequence: _Sequence, room: int) -> _Planned:
        count = min(sequence.left, room)
        self._schedule.computed(sequence.name, count)
        sequence.scheduled = count < sequence.left
        return _Planned(sequence, count, self._need(sequence))

    def _share(self, sequence: _Sequence, tokens: int) -> None:
        """Its first ``tokens`` need not be computed."""
        if tokens > sequence.computed:
            self._schedule.computed(sequence.name, tokens - sequence.computed)
            sequence.computed = tokens
        sequence.blocks = tokens // self._block_tokens

    @property
    def _full(self) -> bool:
        return not self._open or len(self._running) >= self._most_sequences

    def _refused(self, sequence: _Sequence, free: int) -> str | None:
        batch = [*self._running, *self._coming.values()]
        return self._admission.refusal(sequence, batch, free, self._block_tokens)

    def _preempt(self, in_favour: _Sequence) -> PreemptSequence:
        name, why = self._admission.victim(self._running)
        sequence = self._sequences[name]
        self._running.remove(sequence)
        self._schedule.remove(sequence.name)
        sequence.computed = sequence.blocks = 0
        self._schedule_again(sequence)
        return PreemptSequence(sequence.name, f"no block is left for {in_favour.name}; of those running {why}")

    def _schedule_again(self, sequence: _Sequence) -> None:
        sequence.scheduled = True
        self._schedule.add(sequence.name, sequence.left, sequence.order, sequence.arrived_s)

    def _piece(self, sequence: _Sequence, count: int, new_blocks: int) -> Piece:
        sequence.blocks += new_blocks
        return Piece(sequence.name, sequence.computed, count, new_blocks, count == sequence.left)

    def _need(self, sequence: _Sequence) -> int:
        """How many blocks it lacks for the tokens it has; one that was adopted may have brought some to spare."""
        return max(0, self._blocks_for(sequence.tokens) - sequence.blocks)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
