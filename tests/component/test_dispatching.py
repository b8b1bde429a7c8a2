"""One prefill instance's dispatcher on a real broker: it chooses, holds, gives up holding, and chooses anew."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from common.bus.nats_bus import NatsBus
from common.language.dispatching import Dispatching
from common.language.foretelling import Foretelling
from common.language.held import Held
from common.language.settings import LanguageSettings, LengthPrediction
from common.messages.chat import pack_tokens
from common.messages.dispatch import DecodeLoad, DecodeLoads
from common.messages.failures import Failure, Stage
from common.messages.subjects import DECODE_LOADS
from common.models.length_predictor import AnswerLengths
from common.policies.language.length_prediction import LengthBuckets
from tests.support.nats_server import NatsServer
from tests.support.sequences import sequence

WAIT_S = 60.0
LONG_S, SHORT_S = 60.0, 0.1
REFUSED = Failure(stage=Stage.DECODE, code="overloaded", message="full", retryable=True)
NOBODY = Failure(stage=Stage.DECODE, code="nobody_there", message="gone", retryable=True)


class Told:
    """A dispatcher, and a bus over which it is told loads. ``chosen`` are the sequences of which it was chosen."""

    def __init__(self, bus: NatsBus, folder: Path, hold_s: float) -> None:
        lengths = AnswerLengths.of_model(folder, LengthBuckets())
        settings = LanguageSettings(transfer_s=hold_s)
        self.bus = bus
        self.chosen: asyncio.Queue[Held] = asyncio.Queue(100)
        self.foretelling = Foretelling(lengths, LengthPrediction.OFF)
        self.decodes = False
        self.dispatching = Dispatching(
            "prefill-0", bus, settings, self.foretelling, self.chosen.put_nowait, lambda _: self.decodes
        )

    async def tell(self, **free_blocks: int) -> None:
        loads = (DecodeLoad(instance=name, free_blocks=free, heavy=0, light=0) for name, free in free_blocks.items())
        await self.bus.publish(DECODE_LOADS, DecodeLoads(loads=tuple(loads)))

    def begin(self, name: str = "a") -> Held:
        """A sequence of 32 tokens, whose first chunk is computed."""
        held = sequence(name, pack_tokens(range(32)), decode="")
        self.dispatching.add(held)
        self.dispatching.computed([held.key, "another"])
        return held


@contextlib.asynccontextmanager
async def told(url: str, folder: Path, hold_s: float = LONG_S) -> AsyncIterator[Told]:
    async with await NatsBus.connect(url, name="prefill-0") as bus:
        running = Told(bus, folder, hold_s)
        await running.dispatching.listen()
        try:
            yield running
        finally:
            running.foretelling.close()


async def test_a_sequence_is_held_until_somebody_has_room(nats_server: NatsServer, language_model: Path) -> None:
    async with told(nats_server.url, language_model) as running:
        held = running.begin()
        deciding = asyncio.create_task(running.dispatching.decided(held))
        await running.tell(d0=1, d1=1)
        # It has come to decode, and has not to hand anything over to itself.
        await running.tell(**{"prefill-0": 90})
        await running.tell(d0=1, d1=2)
        assert await asyncio.wait_for(deciding, WAIT_S) is None
        assert running.chosen.get_nowait().request.decode == held.unsaid == "d1"
        running.dispatching.taken(held)
        assert not len(running.dispatching)


async def test_what_is_held_goes_on_here_once_it_may(nats_server: NatsServer, language_model: Path) -> None:
    async with told(nats_server.url, language_model) as running:
        held = running.begin()
        deciding = asyncio.create_task(running.dispatching.decided(held))
        await running.tell(d0=1)
        running.dispatching.reconsider()
        assert not held.request.decode
        running.decodes = True
        running.dispatching.reconsider()
        assert await asyncio.wait_for(deciding, WAIT_S) is None
        running.dispatching.taken(held)
        later = running.begin("later")
        # Another may be chosen for it until it waits for nothing else.
        running.dispatching.reconsider()
        assert not later.request.decode
        assert await asyncio.wait_for(running.dispatching.decided(later), WAIT_S) is None
        assert held.request.decode == later.request.decode == "prefill-0"
        assert running.chosen.empty() and running.dispatching.choices == {"prefill-0": 2}


async def test_what_was_held_for_long_goes_to_whoever_has_most_room(
    nats_server: NatsServer, language_model: Path
) -> None:
    async with told(nats_server.url, language_model, SHORT_S) as running:
        unknown = running.begin("unknown")
        failure = await asyncio.wait_for(running.dispatching.decided(unknown), WAIT_S)
        assert failure is not None and (failure.code, failure.retryable) == ("no_instance", True)
        running.dispatching.forget(unknown)
        # The first one has room, so that what it is told is known once it is decided.
        await running.tell(d0=2, d1=0)
        first = running.begin("first")
        while await running.dispatching.decided(first) is not None:
            pass
        second = running.begin("second")
        assert await asyncio.wait_for(running.dispatching.decided(second), WAIT_S) is None
        assert first.request.decode == "d0" and second.request.decode in ("d0", "d1")


async def test_who_did_not_take_it_is_not_chosen_again(nats_server: NatsServer, language_model: Path) -> None:
    async with told(nats_server.url, language_model) as running:
        held = running.begin()
        await running.tell(d0=90, d1=90)
        assert await asyncio.wait_for(running.dispatching.decided(held), WAIT_S) is None
        first = held.request.decode
        assert running.dispatching.again(held, NOBODY)
        assert {first, held.request.decode} == {"d0", "d1"}
        # Nobody else is left, so that the same one may be asked once more, and no more than that.
        assert running.dispatching.again(held, REFUSED)
        assert not running.dispatching.again(held, REFUSED)
        silent = running.begin("silent")
        unclear = REFUSED.model_copy(update={"code": "not_taken_over"})
        assert await asyncio.wait_for(running.dispatching.decided(silent), WAIT_S) is None
        assert not running.dispatching.again(silent, unclear)
