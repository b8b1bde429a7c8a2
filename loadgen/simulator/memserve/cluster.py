"""A simulated cluster: the live scheduler's classes route, engines compute, keys and values move between them."""

import random
from collections.abc import Iterable, Mapping

from common.mempool.address import KEY_BYTES
from common.policies.language.prompt_index import IndexChange, IndexSnapshot, PromptIndex
from common.policies.language.prompt_tree import PromptTree
from common.policies.language.routing import (
    GlobalScheduler,
    InstanceJoined,
    InstanceLost,
    RequestArrived,
    RequestEnded,
    RequestPrefilled,
    Route,
    Rule,
)
from common.policies.language.sites import InstanceKind
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.memserve.carrier import Carrier
from loadgen.simulator.memserve.engine import Engine, Job
from loadgen.simulator.memserve.machine import Caching, TransferMode
from loadgen.simulator.memserve.memory import Memory
from loadgen.simulator.memserve.outcome import Asked, Counts
from loadgen.simulator.memserve.setup import Setup, seen_costs
from loadgen.simulator.memserve.turns import Turn

_GUESSED_ANSWER = 256


class Cluster:
    """It is its engines' ``Watcher``."""

    def __init__(self, clock: Clock, setup: Setup, rule: Rule, seed: int = 0) -> None:
        self.asked: dict[str, Asked] = {}
        self.counts = Counts()
        self.engines: dict[str, Engine] = {}
        self.scheduler = GlobalScheduler(
            rule, PromptIndex(KEY_BYTES, ttl_s=setup.view.ttl_s), seen_costs(setup), setup.view.expects
        )
        self._clock = clock
        self._setup = setup
        self._chance = random.Random(seed)
        self._truth = PromptTree(KEY_BYTES)
        self._followers: dict[str, list[Turn]] = {}
        self._routes: dict[str, Route] = {}
        self._taken_over: set[str] = set()
        self._carrier = Carrier(clock, setup, self.engines, self.counts, self._decodes_elsewhere)
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
        self._carrier.lost(engine)
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
        if job.hands_over and self._setup.transfers.mode is TransferMode.BY_LAYER:
            self._carrier.begin(job, engine, self._decoder_of(job))

    def prefilled(self, job: Job, engine: Engine) -> None:
        """The first token is there; what follows it is computed where the route says."""
        asked = self.asked[job.turn.name]
        if job.attempt != asked.attempts:
            self._carrier.let_go(engine, job.held)
            return
        if asked.attempts == 1 or asked.first_token_s == float("inf"):
            asked.first_token_s = self._clock.now_s
        self.scheduler.handle(RequestPrefilled(job.turn.name), self._clock.now_s)
        if not job.hands_over or job.turn.answer_tokens == 1:
            return
        self.counts.handed_over += 1
        self._carrier.begin(job, engine, self._decoder_of(job))
        self._carrier.prefilled(job)

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
            self._carrier.send_back(turn, engine.name, route.prefill)
        for follower in self._followers.pop(turn.name, ()):
            self._at_its_time(follower)

    def freed(self, engine: Engine) -> None:
        """What waited for memory there may find it now."""
        if not engine.lost:
            self._carrier.has_room(engine)
            engine.poke()

    def _decoder_of(self, job: Job) -> Engine:
        return self.engines[self._routes[job.turn.name].decode]

    def _decodes_elsewhere(self, job: Job) -> None:
        self._taken_over.add(job.turn.name)

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
            self.asked[turn.name].pulled_tokens = self._carrier.pull(route.pull, job, engine)
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
        for instance in self.scheduler.published(told):
            self.counts.repairs += 1
            self._clock.after(self._setup.view.delay_s, lambda instance=instance: self._repair(instance))  # type: ignore[misc]

    def _repair(self, instance: str) -> None:
        if instance in self.engines:
            self._tell(self.engines[instance].memory.publisher.snapshot())

    def _remember(self, turn: Turn, route: Route) -> None:
        """As in the paper: an answer passes by (MemServe, section 6; what is inserted then is not said, and ours)."""
        caching, index = self._setup.caching, self.scheduler.index
        both = turn.all_tokens
        if caching >= Caching.C1:
            index.expect(route.prefill, both if route.prefill == route.decode or caching is Caching.C3 else turn.tokens)
        if caching >= Caching.C2 and route.decode != route.prefill:
            index.expect(route.decode, both)
