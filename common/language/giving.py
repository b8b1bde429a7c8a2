"""What a prefill instance does to have another one go on with its sequences.

As soon as it is known who does, that one is asked what it has of the prompt, and what is computed is sent ahead. At the
first token the sequence is handed over; where it is not taken, another may be chosen. Where nobody is and this instance
has come to decode itself, it goes on here.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from common.bus.port import Bus
from common.engine import Engine, RequestRefused
from common.language.dispatching import Dispatching
from common.language.foretelling import Foretelling, told
from common.language.handed_on import HandedOn
from common.language.handover import HandOver
from common.language.held import Held, Sequences
from common.language.prefixes import prefix_at
from common.language.settings import LanguageSettings
from common.language.speaker import Speaker
from common.language.stepper import Stepper
from common.language.tasks import SpawnFor
from common.messages.failures import Failure


class Giving:
    """Of one instance, any number at once. ``dispatching`` chooses where the route does not say who goes on.

    ``decodes`` says whether this instance takes what is to be decoded; when that changes, ``dispatching`` is told.
    """

    def __init__(
        self,
        instance: str,
        bus: Bus,
        foretelling: Foretelling,
        hand_over: HandOver,
        handed_on: HandedOn,
        sequences: Sequences,
        speaker: Speaker,
        engine: Engine,
        stepper: Stepper,
        settings: LanguageSettings,
        decodes: Callable[[], bool],
        spawn: SpawnFor,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._foretelling = foretelling
        self._hand_over = hand_over
        self._ahead = hand_over.ahead
        self._handed_on = handed_on
        self._sequences = sequences
        self._speaker = speaker
        self._engine = engine
        self._stepper = stepper
        self._ask_s = settings.transfer_s
        self._spawn = spawn
        self._decodes = decodes
        self.dispatching = Dispatching(instance, bus, settings, foretelling, self._chosen, self._may_stay)

    def begin(self, held: Held) -> None:
        """A sequence has come that another instance will go on with; it is not the engine's yet."""
        if held.request.decode:
            self._prepare(held, asks=True)
        else:
            self.dispatching.add(held)

    def step_done(self) -> None:
        """A step is over: who goes on may be chosen, and what it computed may leave."""
        self.dispatching.computed(piece.sequence for piece in self._engine.computed)
        self._ahead.step_done()

    async def run(self, held: Held) -> Failure | None:
        """Have another instance take a parked sequence over.

        Returns:
            Why none does, and it is parked still; None: one has, it is not wanted any more, or it goes on here, which
            its request says then.
        """
        while True:
            failure = await self.dispatching.decided(held)
            if failure is not None or not self._sequences.has(held):
                return failure
            if held.request.decode == self._instance:
                await self._go_on(held)
                return None
            # Noted before: from now on it may be there.
            self._handed_on.note(held.request.request_id, held.request.epoch, held.request.decode)
            failure = await self._hand_over.run(held)
            if failure is None:
                self.dispatching.taken(held)
                return None
            if not self.dispatching.again(held, failure):
                return failure

    def forget(self, held: Held) -> None:
        """It is at its end here."""
        self._ahead.forget(held.key)
        self.dispatching.forget(held)

    def _may_stay(self, held: Held) -> bool:
        """Whether this instance decodes, and all that it may come to have fits here."""
        if not self._decodes():
            return False
        try:
            self._engine.check(held.key, held.asked(park=False))
        except RequestRefused:
            return False
        return True

    async def _go_on(self, held: Held) -> None:
        """Decode a parked sequence here, by what is predicted of it, as if it had been handed over."""
        held.told = await told(held.expected)
        if not self._sequences.has(held):
            return
        held.heavy = self._foretelling.is_heavy(held, held.told)
        self._foretelling.count(held.told)
        self.dispatching.taken(held)
        self._stepper.soon(partial(self._resume, held, self._foretelling.expected_tokens(held, held.told)))

    def _resume(self, held: Held, expected_tokens: int) -> None:
        now_s = asyncio.get_running_loop().time()
        self._engine.expect(held.key, expected_tokens, now_s)
        self._engine.resume(held.key, now_s)

    def _chosen(self, held: Held) -> None:
        # Who is known to have nothing of it is not asked: the answer would be waited for.
        asks = dict(held.request.cached).get(held.request.decode, 0) > 0
        self._stepper.soon(partial(self._prepare, held, asks))
        self._spawn(held, partial(self._say, held), "say of")

    def _prepare(self, held: Held, asks: bool) -> None:
        """It is known who will decode it. Between two steps, or before it is the engine's."""
        if not self._sequences.has(held):
            return
        held.known = None
        if asks and self._engine.caching.keeps_received:
            held.known = asyncio.get_running_loop().create_future()
            self._stepper.soon(partial(self._ask, held, held.known))
        if self._engine.parked(held.key) is None:
            self._ahead.begin(held)

    def _ask(self, held: Held, known: asyncio.Future[int]) -> None:
        """Ask who will decode it what it has of it: now, so that no answer is waited for when it is handed over."""
        tokens = held.tokens

        async def ask() -> None:
            there = 0
            try:
                there = await prefix_at(self._bus, held.request.decode, tokens, self._ask_s)
            finally:
                # Whatever happened: it may be waited for.
                known.set_result(there)

        self._spawn(held, ask, "ask of")

    async def _say(self, held: Held) -> None:
        """Tell the gateway who goes on, unless a token that came meanwhile has."""
        if held.unsaid and self._sequences.has(held):
            await self._speaker.tell({held.request.gateway: [held.hand_to(held.unsaid)]})
