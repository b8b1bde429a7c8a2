"""One engine in virtual time: the live batching policy, a memory for keys and values, and a step that costs time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.policies.language.batching_events import (
    CachedPrefix,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    StepDue,
    StepFinished,
)
from common.policies.language.continuous_batching import ContinuousBatching
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.cost import Machine, StepWork
from loadgen.simulator.language.link import HostLink
from loadgen.simulator.language.requests import ChatRequest


class CannotServe(RuntimeError):
    """A request that no instance of this kind could ever hold."""


class Watcher(Protocol):
    """Who is told how requests get on. Called at the end of a step, before the next one begins."""

    def began(self, request: ChatRequest, instance: "Instance") -> None:
        """The first piece of its prompt is computed."""

    def prefilled(self, request: ChatRequest, instance: "Instance") -> None:
        """Its prompt is computed, and with it the first token is there."""

    def ended(self, request: ChatRequest, instance: "Instance") -> None:
        """Its last token is there."""

    def preempted(self, request: ChatRequest, instance: "Instance") -> None:
        """Its blocks were taken: it will be computed again, or brought back from the host's memory."""


@dataclass(slots=True)
class _Sequence:
    request: ChatRequest
    generated: int
    hands_over: bool
    began: bool
    blocks: int = 0


class Instance:
    """What computes. Whether it prefills, decodes or does both is a matter of what it is given.

    Args:
        batching: over as many blocks as the machine has.
        padded_to: a pass with nothing but prompts computes at least so many tokens (TetriInfer pads a chunk that is not
            full).
        chunk_overhead_s: what a pass with prompt tokens costs beside the pass itself.
        slowed: given a span without disturbance, its start and length, how long it takes (a predictor that runs beside
            the model); None: as long as it takes.
        swap: over which the keys and values of sequences that are preempted while they decode go to the host's memory
            and come back; all steps wait for that. None: they are computed again.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        machine: Machine,
        batching: ContinuousBatching,
        watcher: Watcher,
        padded_to: int = 0,
        chunk_overhead_s: float = 0.0,
        slowed: Callable[[float, float], float] | None = None,
        swap: HostLink | None = None,
    ) -> None:
        self.name = name
        self.machine = machine
        self.batching = batching
        self.busy_s = 0.0
        self.last_busy_s = 0.0
        self.steps = 0
        self.computed_prompt_tokens = 0
        self.padding_tokens = 0
        self._clock = clock
        self._watcher = watcher
        self._padded_to = padded_to
        self._chunk_overhead_s = chunk_overhead_s
        self._slowed = slowed
        self._swap = swap
        # Whose keys and values are in the host's memory, of how many tokens.
        self._swapped: dict[str, CachedPrefix] = {}
        self._moved_blocks = 0
        self._sequences: dict[str, _Sequence] = {}
        self._parked: dict[str, _Sequence] = {}
        self._held_blocks = 0
        self._stepping = False
        self._waking = False

    @property
    def free_blocks(self) -> int:
        return self.machine.blocks - self._held_blocks

    @property
    def waiting_blocks(self) -> int:
        """How many blocks those will take, to begin with, that have none yet."""
        size = self.machine.block_tokens
        return sum(
            -(-(one.request.prompt_tokens + one.generated) // size)
            for one in self._sequences.values()
            if not one.blocks
        )

    @property
    def sequences(self) -> int:
        """How many are here and not at their end, those that wait for their transfer included."""
        return len(self._sequences) + len(self._parked)

    @property
    def answer_tokens(self) -> tuple[int, int]:
        """Of the answers that are decoded here, and of those that are not decoded yet, what is parked included."""
        decoding = waiting = 0
        for one in self._sequences.values():
            if one.began and one.blocks and not one.hands_over:
                decoding += one.request.answer_tokens
            else:
                waiting += one.request.answer_tokens
        return decoding, waiting + sum(one.request.answer_tokens for one in self._parked.values())

    @property
    def computing(self) -> bool:
        """Whether a step is under way."""
        return self._stepping

    @property
    def idle(self) -> bool:
        return not self._stepping and not self.sequences

    def prefill(self, request: ChatRequest, hands_over: bool, expected_tokens: int = 0, cached_tokens: int = 0) -> None:
        """Compute a prompt; and then the answer, or keep the prompt's blocks until ``release``.

        ``cached_tokens`` of the prompt are here already and only take memory; prompt and answer are predicted to come
        to ``expected_tokens`` (0: nobody knows).

        Raises:
            CannotServe: it never fits.
        """
        answer = 1 if hands_over else request.answer_tokens
        most = request.prompt_tokens + answer - 1
        arrival = SequenceArrived(
            request.name, request.prompt_tokens, most, cached_tokens, expected_tokens=expected_tokens
        )
        self._take_in(_Sequence(request, 0, hands_over, began=False), arrival)

    def keep(self, request: ChatRequest, expected_tokens: int = 0) -> None:
        """Go on with a prompt that was computed to be handed over: it stays here, in its blocks."""
        sequence = self._parked.pop(request.name)
        sequence.hands_over = False
        self._take_in(sequence, self._arrival(request, sequence.blocks, expected_tokens))

    def decode(self, request: ChatRequest, expected_tokens: int = 0) -> None:
        """Go on with a request whose prompt's keys and values have come, and wait for room.

        Raises:
            CannotServe: it never fits.
        """
        self._take_in(_Sequence(request, 1, hands_over=False, began=True), self._arrival(request, 0, expected_tokens))

    def release(self, name: str) -> None:
        """The keys and values of a prompt that was handed over are not needed any more."""
        self._held_blocks -= self._parked.pop(name).blocks
        self._wake()

    def _arrival(self, request: ChatRequest, blocks: int, expected_tokens: int) -> SequenceArrived:
        """Of a sequence whose prompt's keys and values are there, in so many blocks of this instance."""
        most = request.prompt_tokens + request.answer_tokens - 1
        prompt = request.prompt_tokens
        return SequenceArrived(request.name, prompt + 1, most, prompt, blocks, expected_tokens)

    def _take_in(self, sequence: _Sequence, arrival: SequenceArrived) -> None:
        for decision in self.batching.handle(arrival, self._clock.now_s):
            if isinstance(decision, RefuseSequence):
                raise CannotServe(f"{sequence.request.name} at {self.name}: {decision.reason}")
        self._sequences[sequence.request.name] = sequence
        self._wake()

    def _wake(self) -> None:
        """Begin a step, once all is known that happens at this moment."""
        if not self._stepping and not self._waking:
            self._waking = True
            self._clock.after(0.0, self._begin)

    def _begin(self) -> None:
        self._waking = False
        step = self._plan()
        if step is None:
            return
        self._stepping = True
        work = self._work(step.pieces)
        now_s = self._clock.now_s
        takes_s = self.machine.cost.step_s(work) + (self._chunk_overhead_s if work.prompt_tokens else 0.0)
        if self._swap is not None:
            takes_s += self._swap.seconds(self._moved_blocks, self.machine.block_bytes)
            self._moved_blocks = 0
        if self._slowed is not None:
            takes_s = self._slowed(now_s, takes_s)
        self.busy_s += takes_s
        self.last_busy_s = now_s + takes_s
        self.steps += 1
        self._clock.after(takes_s, lambda: self._finish(step.pieces))

    def _plan(self) -> RunStep | None:
        """The next step, after as many preemptions as it takes."""
        while decisions := self.batching.handle(StepDue(self.free_blocks, self._swapped), self._clock.now_s):
            for decision in decisions:
                if isinstance(decision, RunStep):
                    return decision
                if isinstance(decision, PreemptSequence):
                    sequence = self._sequences[decision.sequence]
                    if self._swap is not None and sequence.generated:
                        self._swap_out(decision.sequence, sequence)
                    self._held_blocks -= sequence.blocks
                    sequence.blocks = 0
                    self._watcher.preempted(sequence.request, self)
        return None

    def _swap_out(self, name: str, sequence: _Sequence) -> None:
        # Of the token generated last, nothing is computed yet.
        self._swapped[name] = CachedPrefix(sequence.request.prompt_tokens + sequence.generated - 1)
        self._moved_blocks += sequence.blocks

    def _swap_in(self, piece: Piece) -> None:
        """Its blocks, but for those that the piece brings: the last one is among them if it was not full."""
        del self._swapped[piece.sequence]
        size = self.machine.block_tokens
        self._sequences[piece.sequence].blocks += piece.start // size
        self._held_blocks += piece.start // size
        self._moved_blocks += -(-piece.start // size)

    def _work(self, pieces: tuple[Piece, ...]) -> StepWork:
        prompt = attended = decoding = context = 0
        for piece in pieces:
            count = piece.count
            if piece.sequence in self._swapped:
                self._swap_in(piece)
            if piece.new_blocks:
                self._sequences[piece.sequence].blocks += piece.new_blocks
                self._held_blocks += piece.new_blocks
            if count == 1 and piece.last:
                decoding += 1
                context += piece.start + 1
            else:
                prompt += count
                attended += count * piece.start + count * (count + 1) // 2
        self.computed_prompt_tokens += prompt
        if 0 < prompt < self._padded_to and not decoding:
            self.padding_tokens += self._padded_to - prompt
            prompt = self._padded_to
        return StepWork(prompt, attended, decoding, context)

    def _finish(self, pieces: tuple[Piece, ...]) -> None:
        """The step is done: book what came of it, then tell who wants to know, then begin the next one."""
        began, prefilled, leaving, ended = [], [], [], []
        for piece in pieces:
            sequence = self._sequences[piece.sequence]
            if not sequence.began:
                sequence.began = True
                began.append(sequence.request)
            if not piece.last:
                continue
            sequence.generated += 1
            if sequence.generated == 1:
                prefilled.append(sequence.request)
            if sequence.generated == sequence.request.answer_tokens:
                ended.append(sequence.request)
                leaving.append(piece.sequence)
            elif sequence.hands_over:
                leaving.append(piece.sequence)
                self._parked[piece.sequence] = sequence
        self.batching.handle(StepFinished(frozenset(leaving)), self._clock.now_s)
        for name in leaving:
            sequence = self._sequences.pop(name)
            if name not in self._parked:
                self._held_blocks -= sequence.blocks
        for tell, requests in (
            (self._watcher.began, began),
            (self._watcher.prefilled, prefilled),
            (self._watcher.ended, ended),
        ):
            for request in requests:
                tell(request, self)
        self._stepping = False
        self._wake()
