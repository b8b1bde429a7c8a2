"""An instance that is to decode no more hands on what it decodes, a few sequences at a time, and is free of it soon.

TetriInfer (section 3.5) drains by waiting for what was accepted; a sequence that runs can as well go on at another
decode instance, with its keys and values. It stands still only for its own transfer. Whatever begins to decode here
meanwhile (it was on its way, or waited for blocks) goes the same way. What nobody takes goes on here to its end.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count

import structlog

from common.bus.port import Bus
from common.engine import Engine
from common.language.handed_on import HandedOn
from common.language.handover import NOT_RUNNING, HandOver
from common.language.held import Held, Sequences
from common.language.prefixes import prefix_at
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.language.tasks import SpawnFor
from common.messages.chat import SequenceTokens
from common.messages.failures import Failure

log = structlog.get_logger()

_AT_ONCE = 4

Tell = Callable[[dict[str, list[SequenceTokens]]], Awaitable[None]]


class MovingOn:
    """``outcomes`` counts what became of sequences: ``moved``, ``stayed``, or ``ended`` before it was their turn."""

    def __init__(
        self,
        instance: str,
        bus: Bus,
        engine: Engine,
        stepper: Stepper,
        sequences: Sequences,
        hand_over: HandOver,
        handed_on: HandedOn,
        tell: Tell,
        settings: LanguageSettings,
        spawn: SpawnFor,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._engine = engine
        self._stepper = stepper
        self._sequences = sequences
        self._hand_over = hand_over
        self._handed_on = handed_on
        self._tell = tell
        self._ask_s = settings.transfer_s
        self._spawn = spawn
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._turn = count()
        self._others: tuple[str, ...] = ()
        self._looked_at: set[str] = set()
        self._under_way: set[str] = set()
        self.outcomes: Counter[str] = Counter()

    def begin(self, others: tuple[str, ...]) -> None:
        """Nothing is to be decoded here from now on; ``others`` decode, the first of them is the best."""
        self._others = others
        self._looked_at.clear()
        for held in self._sequences.all:
            self.consider(held)

    def end(self) -> None:
        """Sequences may be decoded here again; what is on its way goes on being so."""
        self._others = ()

    def consider(self, held: Held) -> None:
        """It decodes here, as far as is known: hand it on, if it is to be and has not been tried before."""
        if not self._others or held.request.decode != self._instance:
            return
        if held.key not in self._looked_at and held.key not in self._under_way:
            # What has ended is not asked about again.
            self._looked_at &= {one.key for one in self._sequences.all}
            self._looked_at.add(held.key)
            self._under_way.add(held.key)
            self._spawn(held, partial(self._move, held, next(self._turn)), "move")

    async def _move(self, held: Held, turn: int) -> None:
        try:
            async with self._room:
                self.outcomes[await self._outcome(held, turn)] += 1
        finally:
            self._under_way.discard(held.key)

    async def _outcome(self, held: Held, turn: int) -> str:
        others = self._others
        for place in range(len(others)):
            if not self._sequences.has(held):
                return "ended"
            if not self._others:
                break
            failure = await self._to(held, others[(turn + place) % len(others)])
            if failure is None:
                return "moved"
            if failure.code == NOT_RUNNING:
                # It waits, or has yet to come; with its next token here it is looked at again.
                self._looked_at.discard(held.key)
                break
        return "stayed"

    async def _to(self, held: Held, decode: str) -> Failure | None:
        """Why it does not go on there; None: it does, or would if it were wanted still."""
        known = 0
        if self._engine.caching.keeps_received:
            known = await prefix_at(self._bus, decode, held.tokens, self._ask_s)
        # Noted before: from now on it may be there.
        self._handed_on.note(held.request.request_id, held.request.epoch, decode)
        failure = await self._hand_over.move(held, decode, known)
        if failure is not None:
            log.info("not moved", sequence=held.key, to=decode, reason=failure.message)
        elif self._sequences.has(held):
            await self._tell({held.request.gateway: [held.hand_to(decode)]})
            self._sequences.remove(held)
            self._stepper.soon(partial(self._engine.cancel, held.key, asyncio.get_running_loop().time()))
        return failure
