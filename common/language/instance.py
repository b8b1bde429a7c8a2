"""What an instance answers. Its role is state, not code: which part of a sequence is done here, each request says."""

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

import structlog

from common.bus.errors import Refusal
from common.bus.port import Subscription
from common.engine import Output, Request, RequestRefused
from common.language.beginning import Beginning
from common.language.flipping import Roles
from common.language.foretelling import Foretelling
from common.language.giving import Giving
from common.language.handed_on import HandedOn
from common.language.handover import HandOver
from common.language.held import Held, Sequences
from common.language.index_teller import IndexTeller
from common.language.load_reporter import LoadReporter
from common.language.loading import LoadedModel
from common.language.moving import MovingOn
from common.language.prefixes import SendingPrefixes
from common.language.sendback import SendingBack
from common.language.settings import LanguageSettings
from common.language.speaker import Crowd, Speaker
from common.language.stepper import DRAINING, Stepper
from common.language.stored import StoredPrefixes
from common.language.takeover import Receiving
from common.language.tasks import SequenceTasks
from common.mempool.address import TOKEN_BYTES
from common.mempool.transfer import BlockTransfer
from common.messages.chat import (
    MOVED,
    CancelGeneration,
    FindGeneration,
    GenerateTokens,
    GenerationFound,
    OfferKV,
    SequenceTokens,
    TakeOver,
)
from common.messages.cluster import LanguageRole
from common.messages.failures import Acknowledged, Failure, Stage
from common.messages.subjects import (
    CANCEL_GENERATION,
    FIND_GENERATION,
    FLIP_ROLE,
    GENERATE_TOKENS,
    MATCH_PREFIX,
    MOVE_BLOCKS,
    OFFER_KV,
    SEND_PREFIX,
    TAKE_OVER,
    TELL_INDEX,
)
from common.policies.fence import StaleEpoch
from common.runtime.worker import Equipment

log = structlog.get_logger()

# A gateway has at most a thousand sequences under way.
_MOST_HELD = 4096
_MOST_TAKE_OVERS = 256
_MOST_MOVES = 16


class LanguageInstance:
    """The body of a language process; see ``common.runtime.worker.Worker``."""

    def __init__(self, equipment: Equipment, model: LoadedModel, settings: LanguageSettings) -> None:
        self._bus = equipment.bus
        self._instance = equipment.instance
        self._engine = model.engine
        self._sequences = Sequences(_MOST_HELD)
        self._handed_on = HandedOn()
        self._of_sequences = SequenceTasks(self._spawn, self._give_up)
        spawn = self._of_sequences.spawn
        self._speaker = Speaker(equipment.bus, equipment.instance, self._crowd)
        self._stepper = Stepper(model.engine, equipment.compute, self._absorb, self._lose)
        self.hand_over = HandOver(
            equipment.instance, equipment.bus, equipment.tensors, model.engine, self._stepper, settings, spawn
        )
        self._ahead = self.hand_over.ahead
        self.foretelling = Foretelling(model.lengths, settings.length_prediction)
        self.receiving = Receiving(
            equipment.tensors, model.engine, self._stepper, self._sequences, settings, self.foretelling
        )
        self._reporter = LoadReporter(
            equipment.bus, equipment.instance, model.engine, self._stepper, self._sequences, self.receiving
        )
        memory = model.engine.memory
        self._teller = IndexTeller(equipment.bus, equipment.instance, memory, self._stepper)
        self.transfers = BlockTransfer(
            memory, equipment.bus, equipment.tensors, self._stepper.between, settings.transfer_s
        )
        self._giving = Giving(
            equipment.instance,
            equipment.bus,
            self.foretelling,
            self.hand_over,
            self._handed_on,
            self._sequences,
            self._speaker,
            model.engine,
            self._stepper,
            settings,
            lambda: LanguageRole.DECODE in self.roles.now,
            spawn,
        )
        self.dispatching = self._giving.dispatching
        self._prefixes = SendingPrefixes(equipment.bus, model.engine, self._stepper, self.transfers, settings)
        self.sending_back = SendingBack(self._prefixes)
        self.stored = StoredPrefixes(equipment, memory, self.transfers, self._stepper, settings, model.namespace)
        self._beginning = Beginning(
            model.engine, self._stepper, self._sequences, self.foretelling, self.stored.finding, spawn
        )
        self.moving = MovingOn(
            equipment.instance,
            equipment.bus,
            model.engine,
            self._stepper,
            self._sequences,
            self.hand_over,
            self._handed_on,
            self._speaker.tell,
            settings,
            spawn,
        )
        self.roles = Roles(
            equipment.instance, equipment.bus, self.moving, self.dispatching.reconsider, self._give_back, self._spawn
        )
        self._tasks = asyncio.TaskGroup()

    async def listen(self) -> Sequence[Subscription]:
        """Hear requests; they are worked off while ``run`` does."""
        return (
            await self._bus.serve(GENERATE_TOKENS, self._generate, self._instance),
            await self._bus.serve(FIND_GENERATION, self._find, self._instance),
            await self._bus.serve(OFFER_KV, self._offered, self._instance, max_in_flight=_MOST_TAKE_OVERS),
            await self._bus.serve(MATCH_PREFIX, self._prefixes.match, self._instance),
            await self._bus.serve(SEND_PREFIX, self._prefixes.answer, self._instance, max_in_flight=_MOST_MOVES),
            await self._bus.serve(MOVE_BLOCKS, self.transfers.receive, self._instance, max_in_flight=_MOST_MOVES),
            await self._bus.serve(TAKE_OVER, self._take_over, self._instance, max_in_flight=_MOST_TAKE_OVERS),
            await self._bus.serve(TELL_INDEX, self._teller.tell, self._instance),
            await self._bus.serve(FLIP_ROLE, self.roles.flip, self._instance),
            await self._bus.subscribe(CANCEL_GENERATION, self._cancel, self._instance),
            await self.dispatching.listen(),
        )

    async def run(self) -> None:
        """Work until cancelled; what is left then goes on elsewhere."""
        try:
            async with self._tasks:
                self._spawn(self._teller.run(), "tell of the index")
                self._spawn(self._reporter.run(), "report load")
                self._spawn(self.sending_back.run(), "send back")
                self._spawn(self.stored.storing.run(), "store")
                await self._stepper.run()
        finally:
            log.info(
                "keys and values",
                prefilled_tokens=self._engine.counts.prefilled,
                found_tokens=self._engine.counts.found,
                preemptions=self._engine.counts.preempted,
                lengths_told_by=dict(self.foretelling.sources),
                handed_over_bytes=self.hand_over.sent_bytes + self._ahead.sent_bytes,
                moved_bytes=self.transfers.sent_bytes,
                stored_blocks=self.stored.storing.stored_blocks,
                fetched_tokens=self.stored.finding.found_tokens,
                dispatched=dict(self.dispatching.choices),
            )
            self._ahead.stop()
            self.foretelling.close()
            await self._tell_failed(self._sequences.all, DRAINING, f"{self._instance} is leaving")

    def holds(self, request_id: str) -> bool:
        """Whether a sequence waits or runs here."""
        return self._sequences.holds(request_id)

    @property
    def sequences(self) -> int:
        """How many wait or run here."""
        return len(self._sequences)

    async def finish(self) -> None:
        await self._sequences.idle.wait()

    # --- messages ------------------------------------------------------------------------------------------------

    async def _generate(self, request: GenerateTokens) -> Acknowledged:
        if LanguageRole.PREFILL not in self.roles.now:
            raise Refusal(self._failure(request, MOVED, f"{self._instance} prefills no more"))
        held, asked = self._take_in(request, park=request.decode != self._instance)
        if asked.park or self._engine.goes_by_predictions:
            await self.foretelling.begin(held)
            if not self._sequences.has(held):
                return Acknowledged()  # cancelled meanwhile
        if asked.park:
            self._giving.begin(held)
        else:
            held.heavy = self.foretelling.is_heavy(held)
        self._beginning.soon(held, asked)
        return Acknowledged()

    async def _offered(self, offer: OfferKV) -> Acknowledged:
        await self.receiving.offered(offer)
        return Acknowledged()

    async def _take_over(self, handed: TakeOver) -> Acknowledged:
        if handed.running and LanguageRole.DECODE not in self.roles.now:
            raise Refusal(self._failure(handed.request, MOVED, f"{self._instance} decodes no more"))
        held, _ = self._take_in(handed.request, park=False)
        held.prefill = handed.prefill
        held.heavy = self.foretelling.is_heavy(held, handed.expected)
        try:
            await self.receiving.run(held, handed)
        except Exception:
            # Refused, or nobody knows why: in no case does it go on here.
            self._remove(held)
            raise
        return Acknowledged()

    async def _find(self, asked: FindGeneration) -> GenerationFound:
        held = self._sequences.find(asked.request_id, asked.epoch)
        found = GenerationFound(
            request_id=asked.request_id,
            epoch=asked.epoch,
            held=held is not None,
            tokens=held.generated if held is not None else 0,
            decode=self._handed_on.to(asked.request_id, asked.epoch) if held is None else "",
        )
        # The gateway takes for lost what is counted here and has not come.
        await self._speaker.told()
        return found

    async def _cancel(self, cancel: CancelGeneration) -> None:
        held = self._sequences.cancel(cancel.request_id, cancel.epoch)
        self.receiving.cancel(cancel.request_id, cancel.epoch)
        if held is not None:
            self._drop(held)
        if later := self._handed_on.take(cancel.request_id, cancel.epoch):
            await self._bus.publish(CANCEL_GENERATION, cancel, later)

    def _take_in(self, request: GenerateTokens, park: bool) -> tuple[Held, Request]:
        """Raises: Refusal."""
        if self._stepper.ended:
            raise Refusal(self._failure(request, DRAINING, f"{self._instance} is leaving"))
        if self._sequences.full:
            held_here = f"{self._instance} has {len(self._sequences)} sequences"
            raise Refusal(self._failure(request, "overloaded", held_here))
        try:
            held = Held.of(request)
            asked = held.asked(park)
            self._engine.check(held.key, asked)
            former = self._sequences.admit(held)
        except StaleEpoch as stale:
            raise Refusal(self._failure(request, "stale_epoch", str(stale))) from stale
        except (RequestRefused, ValueError) as error:
            raise Refusal(self._failure(request, "cannot_be_answered", str(error), retryable=False)) from error
        if former is not None:
            self._drop(former)
        return held, asked

    # --- between two steps ---------------------------------------------------------------------------------------

    def _drop(self, held: Held) -> None:
        self._giving.forget(held)
        self._stepper.soon(partial(self._engine.cancel, held.key, asyncio.get_running_loop().time()))

    async def _give_back(self) -> None:
        """Prompts that wait and are for others to decode: nothing of them is here, so they are routed anew."""

        def waiting() -> list[Held]:
            return [
                held
                for held in self._sequences.all
                if held.request.decode != self._instance and self._engine.waits(held.key)
            ]

        held = await self._stepper.between(waiting)
        await self._tell_failed(held, MOVED, f"{self._instance} prefills no more")
        for one in held:
            self._drop(one)

    async def _absorb(self, outputs: list[Output]) -> None:
        self._giving.step_done()
        news: dict[str, list[SequenceTokens]] = {}
        handing_over = []
        for output in outputs:
            held = self._sequences.named(output.sequence)
            if held is None:
                # Cancelled during the step; the engine hears of it before the next.
                continue
            news.setdefault(held.request.gateway, []).append(held.take(output))
            self.stored.told(held, last=output.finish is not None)
            if output.finish is not None:
                self._remove(held)
                if held.request.decode == self._instance:
                    self.foretelling.ended(held)
                if held.prefill and self._engine.caching.sends_back:
                    self.sending_back.later(held.tokens[: TOKEN_BYTES * held.kv_tokens], held.prefill)
            elif held.request.decode != self._instance and self._engine.parked(held.key) is not None:
                handing_over.append(held)
            else:
                self.moving.consider(held)
        await self._speaker.tell(news)
        for held in handing_over:
            self._of_sequences.spawn(held, partial(self._hand, held), "hand over")

    async def _hand(self, held: Held) -> None:
        failure = await self._giving.run(held)
        if failure is not None:
            if self._sequences.has(held):
                log.warning("not taken over", sequence=held.key, decode=held.request.decode, reason=failure.message)
                await self._speaker.tell({held.request.gateway: [held.failed(failure)]})
            self._drop(held)
        elif held.request.decode == self._instance:
            return
        self._remove(held)

    async def _lose(self, keys: list[str], error: Exception) -> None:
        held = [one for key in keys if (one := self._sequences.named(key)) is not None]
        await self._tell_failed(held, "step_failed", f"{type(error).__name__}: {error}")

    async def _give_up(self, held: Held, error: Exception) -> None:
        """A task of it failed: it is to go on elsewhere, if it is wanted still, and nothing of it stays here."""
        if self._sequences.has(held):
            self._drop(held)
            await self._tell_failed([held], "task_failed", f"{type(error).__name__}: {error}")

    async def _tell_failed(self, lost: list[Held], code: str, message: str) -> None:
        news: dict[str, list[SequenceTokens]] = {}
        for held in lost:
            failure = self._failure(held.request, code, message)
            news.setdefault(held.request.gateway, []).append(held.failed(failure))
            self._remove(held)
        await self._speaker.tell(news)

    def _crowd(self) -> Crowd:
        return Crowd(self._engine.waiting + self.receiving.waiting, self._engine.counts.preempted)

    def _remove(self, held: Held) -> None:
        """It is at its end here."""
        self._sequences.remove(held)
        self._giving.forget(held)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._tasks.create_task(work, name=name)

    def _failure(self, request: GenerateTokens, code: str, message: str, *, retryable: bool = True) -> Failure:
        """Of a sequence in the phase that it is in here."""
        stage = Stage.DECODE if request.decode == self._instance else Stage.PREFILL
        return Failure(stage=stage, code=code, message=message, retryable=retryable)
