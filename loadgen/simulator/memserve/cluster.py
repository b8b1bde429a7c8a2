"""A simulated cluster: the live scheduler's classes route, engines compute, keys and values move between them."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from common.mempool.address import KEY_BYTES
from common.policies.prompt_index import IndexChange, IndexSnapshot, PromptIndex
from common.policies.prompt_tree import PromptTree
from common.policies.routing import (
    Costs,
    GlobalScheduler,
    InstanceJoined,
    InstanceKind,
    InstanceLost,
    PrefillCost,
    Pull,
    RequestArrived,
    RequestEnded,
    RequestPrefilled,
    Route,
    Rule,
)
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.link import LinkKind, Network
from loadgen.simulator.memserve.engine import Engine, Job
from loadgen.simulator.memserve.machine import (
    LINK_BYTES_PER_S,
    Caching,
    Machine,
    TransferMode,
    Transfers,
    costs_of,
)
from loadgen.simulator.memserve.memory import Held, Memory
from loadgen.simulator.memserve.outcome import Asked, Counts
from loadgen.simulator.memserve.turns import Turn

_GUESSED_ANSWER = 256


@dataclass(frozen=True, slots=True)
class View:
    """How the scheduler comes to know what instances have.

    Attributes:
        publishes: instances tell it. False: as in the paper, it remembers what answers pass by, and forgets by age.
        delay_s: what is told is behind by so much.
        lost: the share of changes that do not come; the next one shows it, and a snapshot repairs it.
        expects: what is routed counts as cached where it was sent.
        cost_noise: predicted times are off by up to this share (paper: 5 % on average, so 0.1).
    """

    publishes: bool = True
    delay_s: float = 0.01
    lost: float = 0.0
    ttl_s: float = 300.0
    expects: bool = True
    cost_noise: float = 0.1


@dataclass(frozen=True, slots=True)
class Setup:
    """A cluster: which instances, how they cache and send, who routes and what it sees."""

    kinds: tuple[InstanceKind, ...]
    machine: Machine
    caching: Caching = Caching.C3
    transfers: Transfers = field(default_factory=Transfers)
    view: View = field(default_factory=View)


@dataclass(frozen=True, slots=True)
class _NoisyCost:
    """A prediction that is wrong by up to ``spread``, always in the same way for the same prompt."""

    exact: PrefillCost
    extra_s: float
    spread: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        wrong = ((prompt_tokens * 2_654_435_761 + cached_tokens * 40_503) % 65_536) / 32_768 - 1
        return (self.exact.exec_s(prompt_tokens, cached_tokens) + self.extra_s) * (1 + self.spread * wrong)


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


class Cluster:
    """It is its engines' ``Watcher``."""

    def __init__(self, clock: Clock, setup: Setup, rule: Rule, seed: int = 0) -> None:
        self.asked: dict[str, Asked] = {}
        self.counts = Counts()
        self.engines: dict[str, Engine] = {}
        self.scheduler = GlobalScheduler(
            rule, PromptIndex(KEY_BYTES, ttl_s=setup.view.ttl_s), _seen_costs(setup), setup.view.expects
        )
        self._clock = clock
        self._setup = setup
        self._chance = random.Random(seed)
        self._network = Network(clock, LinkKind("NVLink", LINK_BYTES_PER_S, 0.0))
        self._truth = PromptTree(KEY_BYTES)
        self._followers: dict[str, list[Turn]] = {}
        self._routes: dict[str, Route] = {}
        self._handovers: dict[str, _Handover] = {}
        self._taken_over: set[str] = set()
        self._waiting: dict[str, list[_Handover]] = {}
        self._kinds: dict[str, InstanceKind] = {}
        self._lives = 0
        # What answers will be is not known: a scheduler can only go by what they were, here from one guess on.
        self._answers = _GUESSED_ANSWER, 1
        for number, kind in enumerate(setup.kinds):
            self._start(f"{kind.value}-{number:03}", kind)

    def run(self, turns: Iterable[Turn]) -> Mapping[str, Asked]:
        """From the first turn to the last end."""
        for turn in turns:
            if turn.after:
                self._followers.setdefault(turn.after, []).append(turn)
            else:
                self._at_its_time(turn)
        self._clock.run()
        return self.asked

    def kill(self, instance: str) -> None:
        """It dies now. Who waited for its answers asks again; what was being sent from or to it is freed elsewhere."""
        engine = self.engines.pop(instance)
        engine.lose()
        self._truth.forget(instance)
        del self._waiting[instance]
        for handover in list(self._handovers.values()):
            if engine in (handover.source, handover.target):
                self._drop(handover)
        self.scheduler.handle(InstanceLost(instance), self._clock.now_s)
        again = [name for name, route in self._routes.items() if self._needs(name, route, instance)]
        for name in again:
            turn = self.asked[name].request
            assert isinstance(turn, Turn)
            self.asked[name].attempts += 1
            self._taken_over.discard(name)
            self._route(turn)

    def _needs(self, name: str, route: Route, instance: str) -> bool:
        """Whether a request is lost with the instance."""
        return route.decode == instance or (route.prefill == instance and name not in self._taken_over)

    # --- what engines tell ---------------------------------------------------------------------------------------

    def began(self, job: Job, engine: Engine) -> None:
        """A prompt is computed from now on; by layers, what is ready is sent at once."""
        asked = self.asked[job.turn.name]
        if job.attempt != asked.attempts:
            return
        asked.cached_tokens = job.cached_tokens
        asked.prefilled_by = engine.name
        self.counts.by_turn[job.turn.name] = (job.turn.prompt_tokens - job.cached_tokens, 0)
        if job.hands_over and self._setup.transfers.mode is TransferMode.BY_LAYER:
            self._hand_over(job, engine)

    def prefilled(self, job: Job, engine: Engine) -> None:
        """The first token is there; what follows it is computed where the route says."""
        asked = self.asked[job.turn.name]
        if job.attempt != asked.attempts:
            self._let_go(job, engine)
            return
        if asked.attempts == 1 or asked.first_token_s == float("inf"):
            asked.first_token_s = self._clock.now_s
        self.scheduler.handle(RequestPrefilled(job.turn.name), self._clock.now_s)
        if not job.hands_over or job.turn.answer_tokens == 1:
            self.counts.fused += 1
            return
        self.counts.handed_over += 1
        handover = self._handovers.get(job.turn.name) or self._hand_over(job, engine)
        handover.prefilled = True
        if handover.arrived:
            self._after_last_layer(handover)

    def ended(self, job: Job, engine: Engine) -> None:
        """The last token is there."""
        turn, asked = job.turn, self.asked[job.turn.name]
        if job.attempt != asked.attempts:
            return
        asked.end_s = self._clock.now_s
        self._answers = self._answers[0] + turn.answer_tokens, self._answers[1] + 1
        asked.decoded_by = engine.name
        route = self._routes.pop(turn.name)
        self._taken_over.discard(turn.name)
        self.scheduler.handle(RequestEnded(turn.name), self._clock.now_s)
        if not self._setup.view.publishes:
            self._remember(turn, route)
        if route.decode != route.prefill and self._setup.caching is Caching.C3 and turn.answer:
            self._send_back(turn, engine, route.prefill)
        for follower in self._followers.pop(turn.name, ()):
            self._at_its_time(follower)

    def freed(self, engine: Engine) -> None:
        """What waited for memory there may find it now."""
        if engine.lost:
            return
        waiting = self._waiting[engine.name]
        while waiting and self._begin(waiting[0]):
            waiting.pop(0)
        engine.poke()

    # --- routing -------------------------------------------------------------------------------------------------

    def _start(self, name: str, kind: InstanceKind) -> None:
        machine = self._setup.machine
        self._lives += 1
        memory = Memory(
            name,
            machine.kv_tokens // machine.block_tokens,
            machine.dram_tokens // machine.block_tokens,
            self._published,
            self._lives,
        )
        caches = self._setup.caching >= (Caching.C2 if kind is InstanceKind.DECODE else Caching.C1)
        self.engines[name] = Engine(name, self._clock, machine, memory, self, caches)
        self._waiting[name] = []
        self._kinds[name] = kind
        self.scheduler.handle(InstanceJoined(name, kind, machine.kv_tokens), self._clock.now_s)

    def _at_its_time(self, turn: Turn) -> None:
        self._clock.at(max(turn.arrival_s, self._clock.now_s), lambda: self._arrive(turn))

    def _arrive(self, turn: Turn) -> None:
        best = max(self._truth.match(turn.tokens).values(), default=0) * self._setup.machine.block_tokens
        self.asked[turn.name] = Asked(turn, asked_s=self._clock.now_s, best_tokens=min(best, turn.prompt_tokens - 1))
        self._route(turn)

    def _route(self, turn: Turn) -> None:
        probably = round(self._answers[0] / self._answers[1])
        arrived = RequestArrived(turn.name, turn.conversation, turn.tokens, turn.prompt_tokens, probably)
        (route,) = self.scheduler.handle(arrived, self._clock.now_s)
        self._routes[turn.name] = route
        engine = self.engines[route.prefill]
        job = Job(turn, route.decode != route.prefill, self.asked[turn.name].attempts)
        if route.pull is not None:
            self._pull(route.pull, job, engine)
        engine.prefill(job)

    # --- what the scheduler comes to know ------------------------------------------------------------------------

    def _published(self, change: IndexChange) -> None:
        if change.kept_blocks is None:
            self._truth.insert(change.instance, change.tokens)
        else:
            self._truth.remove(change.instance, change.tokens, change.kept_blocks)
        view = self._setup.view
        if view.publishes and not (view.lost and self._chance.random() < view.lost):
            self._tell(change)

    def _tell(self, told: IndexChange | IndexSnapshot) -> None:
        self._clock.after(self._setup.view.delay_s, lambda: self._told(told))

    def _told(self, told: IndexChange | IndexSnapshot) -> None:
        if told.instance not in self.engines:
            return
        for instance in self.scheduler.published(told, self._clock.now_s):
            self.counts.repairs += 1
            self._clock.after(self._setup.view.delay_s, lambda instance=instance: self._repair(instance))  # type: ignore[misc]

    def _repair(self, instance: str) -> None:
        if instance in self.engines:
            self._tell(self.engines[instance].memory.publisher.snapshot())

    def _remember(self, turn: Turn, route: Route) -> None:
        """As in the paper: an answer passes by (section 6; what is inserted is the brief's reading, 8.3)."""
        caching, index = self._setup.caching, self.scheduler.index
        both = turn.all_tokens
        if caching >= Caching.C1:
            index.expect(route.prefill, both if route.prefill == route.decode or caching is Caching.C3 else turn.tokens)
        if caching >= Caching.C2 and route.decode != route.prefill:
            index.expect(route.decode, both)

    # --- keys and values on their way ----------------------------------------------------------------------------

    def _send(self, source: str, target: str, tokens: int, arrived: Callable[[], None]) -> None:
        machine, transfers = self._setup.machine, self._setup.transfers
        calls = transfers.calls(tokens, machine.prefill.layers)
        self.counts.network_calls += calls
        # Calls occupy a link as bytes do: what they take is charged as bytes.
        size = round(transfers.alone_s(tokens, machine) * LINK_BYTES_PER_S)
        self._network.send(source, target, size, calls, arrived)

    def _pull(self, pull: Pull, job: Job, target: Engine) -> None:
        """Get a prefix from elsewhere first, if it is there still."""
        turn, block = job.turn, self._setup.machine.block_tokens
        source = self.engines[pull.source]
        held = source.memory.hold(turn.tokens, pull.to_token // block)
        blocks, there = held.cached, target.memory.known_blocks(turn.tokens)
        if blocks <= there:
            source.memory.free(held)
            return
        tokens = (blocks - there) * block
        self.counts.pulls += 1
        self.counts.pulled_tokens += tokens
        self.asked[turn.name].pulled_tokens = tokens
        job.ready = False

        def arrived() -> None:
            if not source.lost:
                source.memory.free(held)
                self.freed(source)
            if not target.lost:
                if not source.lost:
                    self._keep(target, turn.tokens[: blocks * KEY_BYTES])
                job.ready = True
                target.poke()

        self._send(source.name, target.name, tokens, arrived)

    def _keep(self, engine: Engine, tokens: bytes) -> None:
        """What was received becomes historical, if there is room for it."""
        blocks = len(tokens) // KEY_BYTES
        held = engine.memory.take(tokens, blocks, blocks)
        if held is not None:
            engine.memory.index(held, tokens)
            engine.memory.free(held)

    def _hand_over(self, job: Job, source: Engine) -> _Handover:
        """Steps 1 and 3: the decode instance takes in what it lacks, as soon as it has room."""
        handover = _Handover(job, source, self.engines[self._routes[job.turn.name].decode])
        self._handovers[job.turn.name] = handover
        waiting = self._waiting[handover.target.name]
        if waiting or not self._begin(handover):
            waiting.append(handover)
        return handover

    def _begin(self, handover: _Handover) -> bool:
        turn, machine = handover.job.turn, self._setup.machine
        blocks = -(-(turn.prompt_tokens + turn.answer_tokens - 1) // machine.block_tokens)
        known = turn.tokens if self._setup.caching >= Caching.C2 else b""
        handover.held = handover.target.memory.take(known, turn.prompt_tokens // machine.block_tokens, blocks)
        if handover.held is None:
            return False
        handover.missing_tokens = turn.prompt_tokens - handover.held.cached * machine.block_tokens
        self.counts.sent_tokens += handover.missing_tokens
        computed = self.counts.by_turn[turn.name][0]
        self.counts.by_turn[turn.name] = (computed, handover.missing_tokens)
        handover.source.steal(self._setup.transfers.engine_s(handover.missing_tokens, machine))
        self._send(handover.source.name, handover.target.name, handover.missing_tokens, lambda: self._arrived(handover))
        return True

    def _arrived(self, handover: _Handover) -> None:
        handover.arrived = True
        if handover.prefilled and self._handovers.get(handover.job.turn.name) is handover:
            self._after_last_layer(handover)

    def _after_last_layer(self, handover: _Handover) -> None:
        """By layers, the last one is still to come when the prompt is computed."""
        last_s = 0.0
        if self._setup.transfers.mode is TransferMode.BY_LAYER:
            machine = self._setup.machine
            last_s = self._setup.transfers.alone_s(handover.missing_tokens, machine) / machine.prefill.layers
        self._clock.after(last_s, lambda: self._take_over(handover))

    def _take_over(self, handover: _Handover) -> None:
        job = handover.job
        if self._handovers.get(job.turn.name) is not handover:
            return
        del self._handovers[job.turn.name]
        self._taken_over.add(job.turn.name)
        self._let_go(job, handover.source)
        assert handover.held is not None
        job.held = handover.held
        if self._setup.caching >= Caching.C2:
            handover.target.memory.index(job.held, job.turn.tokens)
        handover.target.decode(job)

    def _drop(self, handover: _Handover) -> None:
        """One of its ends is dead: the other frees what it held for it (section 11)."""
        del self._handovers[handover.job.turn.name]
        if not handover.target.lost:
            if handover.held is not None:
                handover.target.memory.free(handover.held)
            else:
                self._waiting[handover.target.name].remove(handover)
            self.freed(handover.target)
        if handover.prefilled:
            self._let_go(handover.job, handover.source)

    def _let_go(self, job: Job, engine: Engine) -> None:
        if job.held is not None and not engine.lost:
            engine.memory.free(job.held)
            self.freed(engine)

    def _send_back(self, turn: Turn, source: Engine, target: str) -> None:
        """Step 5: what was decoded goes back to where the prompt was computed. Nobody waits for it."""
        tokens, block = turn.all_tokens, self._setup.machine.block_tokens
        missing = turn.prompt_tokens + turn.answer_tokens - 1 - turn.prompt_tokens // block * block
        self.counts.returned_tokens += missing

        def arrived() -> None:
            engine = self.engines.get(target)
            # Without the prompt before it, a suffix is of no use.
            if engine is not None and engine.memory.known_blocks(turn.tokens) >= len(turn.tokens) // KEY_BYTES:
                self._keep(engine, tokens[: len(tokens) // KEY_BYTES * KEY_BYTES])

        self._send(source.name, target, missing, arrived)


def _seen_costs(setup: Setup) -> Costs:
    exact = costs_of(setup.machine, setup.transfers)
    noisy = _NoisyCost(exact.prefill, setup.machine.pass_extra_s, setup.view.cost_noise)
    return Costs(noisy, exact.decode, exact.link, exact.kv_token_bytes, exact.block_tokens)
