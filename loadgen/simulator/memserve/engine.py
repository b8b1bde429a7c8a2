"""One instance's engine: prompts first come first served, decoding between them; memory from the live ``MemPool``.

As in the engine that MemServe builds on, waiting prompts go before decoding, whole, several in a pass if they are
short. A sequence gets the memory for its whole answer when it begins, so none is ever preempted (vLLM preempts).
Decoding is computed many steps at a time, see ``batch``.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from loadgen.simulator.language.clock import Clock
from loadgen.simulator.memserve.batch import Batch
from loadgen.simulator.memserve.machine import Machine
from loadgen.simulator.memserve.memory import Held, Memory
from loadgen.simulator.memserve.turns import Turn


class CannotServe(RuntimeError):
    """A request that this instance could never hold."""


@dataclass(slots=True, eq=False)
class Job:
    """A request at an engine.

    Attributes:
        hands_over: it will be decoded elsewhere.
        ready: False: what is pulled for it is still to come. It keeps its place.
        cached_tokens: found when it began.
    """

    turn: Turn
    hands_over: bool
    attempt: int
    ready: bool = True
    held: Held | None = None
    cached_tokens: int = 0


class Watcher(Protocol):
    """Who is told how jobs get on, between two passes."""

    def began(self, job: Job, engine: "Engine") -> None:
        """Its prompt is computed from now on."""

    def prefilled(self, job: Job, engine: "Engine") -> None:
        """Its first token is there."""

    def ended(self, job: Job, engine: "Engine") -> None:
        """Its last token is there."""

    def freed(self, engine: "Engine") -> None:
        """Memory has become free."""


class Engine:
    """``caches``: whether prompts are looked up and kept."""

    def __init__(
        self, name: str, clock: Clock, machine: Machine, memory: Memory, watcher: Watcher, caches: bool
    ) -> None:
        self.name = name
        self.memory = memory
        self.busy_s = 0.0
        self.lost = False
        self._clock = clock
        self._machine = machine
        self._watcher = watcher
        self._caches = caches
        self._waiting: deque[Job] = deque()
        self._batch = Batch(machine.decode)
        self._decoding: dict[str, Job] = {}
        self._joining: list[Job] = []
        self._state = "idle"
        self._began_s = 0.0
        self._until_s = 0.0
        self._version = 0
        self._stolen_s = 0.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def prefill(self, job: Job) -> None:
        """Compute a prompt when its turn comes."""
        blocks = self._blocks_of(job)
        if blocks > self.memory.blocks:
            raise CannotServe(f"{job.turn.name} needs {blocks} blocks, {self.name} has {self.memory.blocks}")
        self._waiting.append(job)
        self.poke()

    def decode(self, job: Job) -> None:
        """Go on with a job whose keys and values are here, in what it holds."""
        self._joining.append(job)
        self.poke()

    def steal(self, seconds: float) -> None:
        """Making network calls keeps the engine so long from its next pass."""
        self._stolen_s += seconds

    def poke(self) -> None:
        """There is something new: begin, or end the run of decode steps with the one that is under way."""
        if self.lost:
            return
        if self._state == "idle":
            self._next()
        elif self._state == "decoding":
            steps = self._batch.steps_within(self._clock.now_s - self._began_s)
            end_s = max(self._clock.now_s, self._began_s + self._batch.span_s(steps))
            if end_s < self._until_s:
                self._decode_until(end_s, steps)

    def lose(self) -> None:
        """It dies with all it has."""
        self.lost = True
        self._version += 1

    def _next(self) -> None:
        """Between two passes: what is run next."""
        self._state = "idle"
        jobs = self._admitted()
        if jobs:
            self._run_prefill(jobs)
            return
        for job in self._joining:
            self._batch.join(job.turn.name, job.turn.prompt_tokens, job.turn.answer_tokens - 1)
            self._decoding[job.turn.name] = job
        self._joining.clear()
        if len(self._batch):
            self._state = "decoding"
            self._began_s = self._clock.now_s
            steps = self._batch.steps_to_first_end
            self._decode_until(self._began_s + self._batch.span_s(steps), steps)

    # --- prefill -------------------------------------------------------------------------------------------------

    def _admitted(self) -> list[Job]:
        """The first that wait, as far as there is memory for them and they fit in one pass."""
        jobs: list[Job] = []
        tokens = 0
        while self._waiting:
            job = self._waiting[0]
            turn = job.turn
            if not job.ready or (jobs and tokens + turn.prompt_tokens > self._machine.pass_tokens):
                break
            most_cached = (turn.prompt_tokens - 1) // self._machine.block_tokens if self._caches else 0
            job.held = self.memory.take(turn.tokens if self._caches else b"", most_cached, self._blocks_of(job))
            if job.held is None:
                break
            job.cached_tokens = job.held.cached * self._machine.block_tokens
            tokens += turn.prompt_tokens - job.cached_tokens
            jobs.append(self._waiting.popleft())
        return jobs

    def _run_prefill(self, jobs: list[Job]) -> None:
        self._state = "prefilling"
        parts = [(job.turn.prompt_tokens, job.cached_tokens) for job in jobs]
        swapped = sum(job.held.swapped for job in jobs if job.held is not None) * self._machine.block_tokens
        takes_s = self._machine.prefill.batch_s(parts) + self._machine.pass_extra_s + self._stolen_s
        takes_s += swapped * self._machine.kv_token_bytes / self._machine.swap_bytes_per_s
        self._stolen_s = 0.0
        self.busy_s += takes_s
        for job in jobs:
            self._watcher.began(job, self)
        self._clock.after(takes_s + self._stolen_s, lambda: self._prefilled(jobs))
        self._stolen_s = 0.0

    def _prefilled(self, jobs: list[Job]) -> None:
        if self.lost:
            return
        for job in jobs:
            assert job.held is not None
            if self._caches:
                self.memory.index(job.held, job.turn.tokens)
            self._watcher.prefilled(job, self)
            if job.turn.answer_tokens == 1:
                self._end(job)
            elif not job.hands_over:
                self._joining.append(job)
        self._next()

    def _blocks_of(self, job: Job) -> int:
        answer = 0 if job.hands_over else job.turn.answer_tokens - 1
        return math.ceil((job.turn.prompt_tokens + answer) / self._machine.block_tokens)

    # --- decoding ------------------------------------------------------------------------------------------------

    def _decode_until(self, end_s: float, steps: int) -> None:
        self._until_s = end_s
        self._version += 1
        version = self._version
        self._clock.at(end_s, lambda: self._decoded(version, steps))

    def _decoded(self, version: int, steps: int) -> None:
        if version != self._version:
            return
        self.busy_s += self._clock.now_s - self._began_s
        for name in self._batch.advance(steps):
            self._end(self._decoding.pop(name))
        self._next()

    def _end(self, job: Job) -> None:
        assert job.held is not None
        if self._caches and job.turn.answer:
            self.memory.index(job.held, job.turn.all_tokens)
        self._watcher.ended(job, self)
        self.memory.free(job.held)
        self._watcher.freed(self)
