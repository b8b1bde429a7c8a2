"""The prefill instance's dispatcher, live: it chooses who goes on with a sequence (TetriInfer, section 3.3.4).

A choice is made once the first chunk of a prompt is computed and the length of the answer is predicted, by what the
last broadcast said. Where nobody has room the sequence stays here, for ``transfer_s`` at most, or for good if this
instance comes to decode; whoever does not take it is not chosen for it again as long as there is another.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import structlog

from common.bus.port import Bus, Subscription
from common.language.foretelling import Foretelling
from common.language.held import Held
from common.language.settings import LanguageSettings
from common.mempool.address import BLOCK_TOKENS
from common.messages.chat import tokens_in
from common.messages.dispatch import DecodeLoads
from common.messages.failures import Failure, Stage
from common.messages.subjects import DECODE_LOADS
from common.policies.language import decode_dispatch as policy
from common.policies.language.length_prediction import LengthRange

log = structlog.get_logger()

_MOST_TRIES = 3


@dataclass(slots=True)
class _Undecided:
    """A sequence that the route gives to nobody.

    ``decode``: whom it is given to, once that is chosen; ``waits``: all else is done.
    """

    held: Held
    decode: asyncio.Future[str]
    begun: bool = False
    waits: bool = False
    refused_by: list[str] = field(default_factory=list)


class Dispatching:
    """All sequences of one instance that are given to nobody yet. Called on the event loop.

    ``chosen`` is told of each choice of another instance; ``may_stay`` says whether a sequence may go on here where
    none is chosen; ``choices`` counts by instance.
    """

    def __init__(
        self,
        instance: str,
        bus: Bus,
        settings: LanguageSettings,
        foretelling: Foretelling,
        chosen: Callable[[Held], None],
        may_stay: Callable[[Held], bool],
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._foretelling = foretelling
        self._chosen = chosen
        self._may_stay = may_stay
        self._hold_s = settings.transfer_s
        self._policy = policy.DecodeDispatch(
            settings.dispatch_rule,
            delay=policy.DelayCost(
                settings.delay_sequence_ms, settings.delay_heavy_ms, 1000 / settings.transfer_tokens_s
            ),
            block_tokens=BLOCK_TOKENS,
        )
        self._chance = random.Random()
        self._undecided: dict[str, _Undecided] = {}
        self.choices: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many are not taken yet by whoever goes on."""
        return len(self._undecided)

    async def listen(self) -> Subscription:
        """Hear the broadcasts."""
        return await self._bus.subscribe(DECODE_LOADS, self._heard)

    def add(self, held: Held) -> None:
        """A sequence has come that is to be given to somebody."""
        self._undecided[held.key] = _Undecided(held, asyncio.get_running_loop().create_future())

    def computed(self, sequences: Iterable[str]) -> None:
        """Something of these was computed, by their names in the engine: time to choose, for those that are added."""
        for key in sequences:
            undecided = self._undecided.get(key)
            if undecided is None or undecided.begun:
                continue
            undecided.begun = True
            expected = undecided.held.expected
            if expected is None or expected.done():
                self._begin(undecided)
            else:
                expected.add_done_callback(partial(self._predicted, key))

    def forget(self, held: Held) -> None:
        """It is at its end here, wherever it goes on."""
        undecided = self._undecided.pop(held.key, None)
        if undecided is not None:
            undecided.decode.cancel()
            self._policy.handle(policy.SequenceGone(held.key))

    async def decided(self, held: Held) -> Failure | None:
        """Wait until it is given to somebody, who stands in its request then.

        Returns:
            Why it is not; None: it is, or need not be.
        """
        undecided = self._undecided.get(held.key)
        if undecided is None:
            return None
        undecided.waits = True
        self._stay(undecided)
        await asyncio.wait((undecided.decode,), timeout=self._hold_s)
        if not undecided.decode.done():
            self._carry_out(self._policy.handle(policy.HeldLongEnough(held.key)))
        if undecided.decode.done():
            return None
        message = f"no decode instance is known that could take it, for {self._hold_s:g} s"
        return Failure(stage=Stage.PREFILL, code="no_instance", message=message, retryable=True)

    def reconsider(self) -> None:
        """Whether sequences may go on here has changed."""
        for undecided in tuple(self._undecided.values()):
            if undecided.waits:
                self._stay(undecided)

    def _stay(self, undecided: _Undecided) -> None:
        """If it may, and nobody else was chosen. Its keys and values are here."""
        held = undecided.held
        if not undecided.decode.done() and self._may_stay(held):
            self._policy.handle(policy.SequenceGone(held.key))
            self.choices[self._instance] += 1
            held.goes_to(self._instance)
            undecided.decode.set_result(self._instance)

    def taken(self, held: Held) -> None:
        """Whom it was given to has it."""
        if self._undecided.pop(held.key, None) is not None:
            self._policy.handle(policy.SequenceHandedOver(held.key))

    def again(self, held: Held, failure: Failure) -> bool:
        """It was not taken. Whether it is to be given to another, who is chosen now or later."""
        undecided = self._undecided.get(held.key)
        # Where there was no answer, it may be there all the same.
        if undecided is None or not failure.retryable or failure.code == "not_taken_over":
            return False
        undecided.refused_by.append(held.request.decode)
        if len(undecided.refused_by) == _MOST_TRIES:
            return False
        log.info("chosen anew", sequence=held.key, refused_by=held.request.decode, reason=failure.message)
        self._policy.handle(policy.SequenceGone(held.key))
        if failure.code == "nobody_there":
            self._policy.handle(policy.InstanceGone(held.request.decode))
        undecided.decode = asyncio.get_running_loop().create_future()
        self._begin(undecided)
        return True

    def _predicted(self, key: str, _: object) -> None:
        undecided = self._undecided.get(key)
        if undecided is not None and not undecided.decode.done():
            self._begin(undecided)

    def _begin(self, undecided: _Undecided) -> None:
        held = undecided.held
        event = policy.SequenceBegan(
            held.key,
            tokens_in(held.tokens),
            _left(held, self._foretelling.answer(held)),
            (self._chance.random(), self._chance.random()),
            dict(held.request.cached),
            undecided.refused_by,
        )
        self._carry_out(self._policy.handle(event))

    def _heard(self, told: DecodeLoads) -> None:
        # An instance that has come to decode hands over what it has yet to prefill like any other.
        others = [one for one in told.loads if one.instance != self._instance]
        loads = tuple(policy.DecodeLoad(one.instance, one.free_blocks, one.heavy, one.light) for one in others)
        self._carry_out(self._policy.handle(policy.LoadsBroadcast(loads)))

    def _carry_out(self, choices: Iterable[policy.ChooseDecode]) -> None:
        for choice in choices:
            undecided = self._undecided[choice.sequence]
            log.debug("dispatched", sequence=choice.sequence, decode=choice.instance, reason=choice.reason)
            self.choices[choice.instance] += 1
            undecided.held.goes_to(choice.instance)
            undecided.decode.set_result(choice.instance)
            self._chosen(undecided.held)


def _left(held: Held, answer: LengthRange) -> LengthRange:
    """How many tokens are yet to come, of which no more come than were asked for."""
    most = held.request.sampling.max_tokens
    low, high = (max(0, min(end, most) - held.generated) for end in (answer.low, answer.high))
    return LengthRange(low, high, answer.source)
