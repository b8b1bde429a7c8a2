"""Keys and values on their way between instances: hand-overs, what goes back, pulls (MemServe, sections 4.3 and 5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.mempool.address import KEY_BYTES
from common.policies.language.routing import Pull
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.link import LinkKind, Network
from loadgen.simulator.memserve.engine import Engine, Job
from loadgen.simulator.memserve.machine import LINK_BYTES_PER_S, Caching, TransferMode
from loadgen.simulator.memserve.memory import Held
from loadgen.simulator.memserve.outcome import Counts
from loadgen.simulator.memserve.setup import Setup
from loadgen.simulator.memserve.turns import Turn


@dataclass(slots=True, eq=False)
class _Handover:
    """A prompt's keys and values on their way from where it is prefilled."""

    job: Job
    source: Engine
    target: Engine
    held: Held | None = None
    missing_tokens: int = 0
    arrived: bool = False
    prefilled: bool = False


class Carrier:
    """``engines``: those that live, kept by the caller. ``taken_over`` is told what is decoded elsewhere now."""

    def __init__(
        self,
        clock: Clock,
        setup: Setup,
        engines: Mapping[str, Engine],
        counts: Counts,
        taken_over: Callable[[Job], None],
    ) -> None:
        self._clock = clock
        self._setup = setup
        self._engines = engines
        self._counts = counts
        self._taken_over = taken_over
        self._network = Network(clock, LinkKind("NVLink", LINK_BYTES_PER_S, 0.0))
        self._handovers: dict[str, _Handover] = {}
        self._waiting: dict[str, list[_Handover]] = {}

    # --- from prefill to decode ----------------------------------------------------------------------------------

    def begin(self, job: Job, source: Engine, target: Engine) -> None:
        """Steps 1 and 3: the decode instance takes in what it lacks, as soon as it has room. Again: nothing happens."""
        if job.turn.name in self._handovers:
            return
        handover = self._handovers[job.turn.name] = _Handover(job, source, target)
        waiting = self._waiting.setdefault(target.name, [])
        if waiting or not self._send_prompt(handover):
            waiting.append(handover)

    def prefilled(self, job: Job) -> None:
        """All of a prompt that has been begun is computed."""
        handover = self._handovers[job.turn.name]
        handover.prefilled = True
        if handover.arrived:
            self._finish(handover)

    def has_room(self, engine: Engine) -> None:
        """What waited for memory there may find it now."""
        waiting = self._waiting.get(engine.name, [])
        while waiting and self._send_prompt(waiting[0]):
            waiting.pop(0)

    def lost(self, engine: Engine) -> None:
        """It is dead: the other ends of its hand-overs free what they held for them (MemServe's cluster manager)."""
        self._waiting.pop(engine.name, None)
        for handover in [one for one in self._handovers.values() if engine in (one.source, one.target)]:
            del self._handovers[handover.job.turn.name]
            if not handover.target.lost and handover.held is None:
                self._waiting[handover.target.name].remove(handover)
            self.let_go(handover.target, handover.held)
            if handover.prefilled:
                self.let_go(handover.source, handover.job.held)

    def let_go(self, engine: Engine, held: Held | None) -> None:
        """Free what was held there."""
        if held is not None and not engine.lost:
            engine.memory.free(held)
            self.has_room(engine)
            engine.poke()

    def _send_prompt(self, handover: _Handover) -> bool:
        turn, machine = handover.job.turn, self._setup.machine
        blocks = -(-(turn.prompt_tokens + turn.answer_tokens - 1) // machine.block_tokens)
        known = turn.tokens if self._setup.caching >= Caching.C2 else b""
        handover.held = handover.target.memory.take(known, turn.prompt_tokens // machine.block_tokens, blocks)
        if handover.held is None:
            return False
        handover.missing_tokens = turn.prompt_tokens - handover.held.cached * machine.block_tokens
        self._counts.sent_tokens += handover.missing_tokens
        self._counts.sent_by_turn[turn.name] = handover.missing_tokens
        handover.source.steal(self._setup.transfers.engine_s(handover.missing_tokens, machine))
        source, target = handover.source.name, handover.target.name
        self._send(source, target, handover.missing_tokens, lambda: self._arrived(handover))
        return True

    def _arrived(self, handover: _Handover) -> None:
        handover.arrived = True
        if handover.prefilled and self._is_current(handover):
            self._finish(handover)

    def _finish(self, handover: _Handover) -> None:
        """By layers, the last one is still to come when the prompt is computed."""
        last_s = 0.0
        if self._setup.transfers.mode is TransferMode.BY_LAYER:
            machine = self._setup.machine
            last_s = self._setup.transfers.alone_s(handover.missing_tokens, machine) / machine.prefill.layers
        self._clock.after(last_s, lambda: self._take_over(handover))

    def _take_over(self, handover: _Handover) -> None:
        job = handover.job
        if not self._is_current(handover):
            return
        del self._handovers[job.turn.name]
        given, job.held = job.held, handover.held
        assert job.held is not None
        self._taken_over(job)
        self.let_go(handover.source, given)
        if self._setup.caching >= Caching.C2:
            handover.target.memory.index(job.held, job.turn.tokens)
        handover.target.decode(job)

    def _is_current(self, handover: _Handover) -> bool:
        return self._handovers.get(handover.job.turn.name) is handover

    # --- other ways ----------------------------------------------------------------------------------------------

    def send_back(self, turn: Turn, source: str, target: str) -> None:
        """Step 5: what was decoded goes back to where the prompt was computed. Nobody waits for it."""
        tokens, block = turn.all_tokens, self._setup.machine.block_tokens
        missing = turn.prompt_tokens + turn.answer_tokens - 1 - turn.prompt_tokens // block * block
        self._counts.returned_tokens += missing

        def arrived() -> None:
            engine = self._engines.get(target)
            # Without the prompt before it, a suffix is of no use.
            if engine is not None and engine.memory.known_blocks(turn.tokens) >= len(turn.tokens) // KEY_BYTES:
                engine.memory.keep(tokens)

        self._send(source, target, missing, arrived)

    def pull(self, pull: Pull, job: Job, target: Engine) -> int:
        """Get a prefix from elsewhere before ``job`` is computed, if it is there still; how many tokens."""
        tokens, block = job.turn.tokens, self._setup.machine.block_tokens
        source = self._engines[pull.source]
        held = source.memory.hold(tokens, pull.to_token // block)
        blocks, there = held.cached, target.memory.known_blocks(tokens)
        if blocks <= there:
            source.memory.free(held)
            return 0
        missing = (blocks - there) * block
        self._counts.pulls += 1
        self._counts.pulled_tokens += missing
        job.ready = False

        def arrived() -> None:
            self.let_go(source, held)
            if not target.lost:
                if not source.lost:
                    target.memory.keep(tokens[: blocks * KEY_BYTES])
                job.ready = True
                target.poke()

        self._send(source.name, target.name, missing, arrived)
        return missing

    def _send(self, source: str, target: str, tokens: int, arrived: Callable[[], None]) -> None:
        machine, transfers = self._setup.machine, self._setup.transfers
        calls = transfers.calls(tokens, machine.prefill.layers)
        self._counts.network_calls += calls
        # Calls occupy a link as bytes do: what they take is charged as bytes.
        size = round(transfers.alone_s(tokens, machine) * LINK_BYTES_PER_S)
        self._network.send(source, target, size, calls, arrived)
