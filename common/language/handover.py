"""The giving end of a hand-over: it offers a parked sequence's blocks and keeps them until they are taken.

MemServe, section 4.3 and figure 5: with all layers at once after the prompt (by request, aggregated), or with what was
not sent while the prompt was computed (``ahead``). What runs already is handed on between two steps, all of it at once.
"""

import asyncio
from functools import partial

from common.bus.errors import BusError, NobodyThere, RemoteFailure
from common.bus.port import Bus
from common.engine import Engine
from common.language.ahead import SendingAhead, SentAhead
from common.language.blocks import Part, blocks_part, bytes_in, exported
from common.language.foretelling import told
from common.language.held import Held
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.language.tasks import SpawnFor
from common.mempool.allocator import Access
from common.mempool.transfer import MARGIN_S
from common.messages.chat import TakeOver
from common.messages.failures import Failure, Stage
from common.messages.subjects import TAKE_OVER
from common.models.causal_lm import BLOCK_TOKENS, BlockTable
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

NOT_RUNNING = "not_running"
"""The code of a failure to hand on what cannot be parked now."""


class HandOver:
    """Hands parked sequences over, any number at once. ``ahead`` is what leaves before they are parked.

    A receiver that has the first tokens' is sent the rest (PD-Caching-2). ``sent_bytes`` counts what was taken at the
    end, ``ahead`` what was before.
    """

    def __init__(
        self,
        instance: str,
        bus: Bus,
        tensors: Tensors,
        engine: Engine,
        stepper: Stepper,
        settings: LanguageSettings,
        spawn: SpawnFor,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._settings = settings
        self.sent_bytes = 0
        self.ahead = SendingAhead(instance, bus, tensors, engine, stepper, settings, spawn)

    async def run(self, held: Held) -> Failure | None:
        """Hand a parked sequence over, and free its blocks here once it is taken.

        Returns:
            Why it was not taken over, and is parked still; None: it was, or is not wanted any more.
        """
        opened = await self._stepper.between(partial(self._open, held))
        if opened is None:
            return None
        table, access = opened
        try:
            failure = await self._offer_prefilled(held, table)
        finally:
            self._stepper.soon(partial(self._engine.allocator.end_access, access))
        if failure is None:
            self._stepper.soon(partial(self._engine.cancel, held.key, asyncio.get_running_loop().time()))
        return failure

    async def move(self, held: Held, decode: str, known: int) -> Failure | None:
        """Hand a running sequence on to ``decode``, which has keys and values of its first ``known`` tokens already.

        What was not taken goes on here. What was stays parked, until it is cancelled in the engine.

        Returns:
            Why it was not taken; None: it was.
        """
        opened = await self._stepper.between(partial(self._stop, held))
        if opened is None:
            return Failure(stage=Stage.DECODE, code=NOT_RUNNING, message=f"{held.key} waits, or is at its end")
        table, access = opened
        failure: Failure | None = None
        try:
            first = min(known, held.kv_tokens) // BLOCK_TOKENS
            handed = TakeOver(
                request=held.so_far().model_copy(update={"decode": decode}),
                prefill=held.prefill,
                parts=(),
                kv_tokens=held.kv_tokens,
                block_tokens=BLOCK_TOKENS,
                first_block=first,
                expected=held.told,
                running=True,
            )
            failure = await self._ask(handed, self._rest(held, table, first * BLOCK_TOKENS))
        finally:
            self._stepper.soon(partial(self._engine.allocator.end_access, access))
            if failure is not None:
                self._stepper.soon(partial(self._engine.resume, held.key, asyncio.get_running_loop().time()))
        return failure

    def _stop(self, held: Held) -> tuple[BlockTable, Access] | None:
        table = self._engine.park(held.key, asyncio.get_running_loop().time())
        return None if table is None else self._opened(held, table)

    def _open(self, held: Held) -> tuple[BlockTable, Access] | None:
        """The blocks; None: cancelled. Nobody writes to them while they are parked."""
        table = self._engine.parked(held.key)
        return None if table is None else self._opened(held, table)

    def _opened(self, held: Held, table: BlockTable) -> tuple[BlockTable, Access]:
        count = self._engine.pool.layout.blocks_for(held.kv_tokens)
        return BlockTable(table.blocks), self._engine.allocator.begin_access(table.blocks[:count])

    async def _offer_prefilled(self, held: Held, table: BlockTable) -> Failure | None:
        expected = await told(held.expected)
        sent = await self.ahead.finish(held.key)
        parts: list[Part] = list(sent.parts)
        known = 0 if sent.offers else await held.known_there()
        if known:
            parts, sent = [], SentAhead(tokens=known)
        parts += self._rest(held, table, sent.tokens)
        handed = TakeOver(
            request=held.so_far(),
            prefill=self._instance,
            parts=(),
            kv_tokens=held.kv_tokens,
            block_tokens=BLOCK_TOKENS,
            first_block=known // BLOCK_TOKENS,
            offers=sent.offers,
            expected=expected,
        )
        try:
            return await self._ask(handed, parts)
        finally:
            self.ahead.taken_over(held.key)

    def _rest(self, held: Held, table: BlockTable, first_token: int) -> list[Part]:
        """All from this token on, the first of a block; it may be nothing."""
        if first_token >= held.kv_tokens:
            return []
        return [blocks_part(self._engine.pool, table, first_token, held.kv_tokens)]

    async def _ask(self, handed: TakeOver, parts: list[Part]) -> Failure | None:
        """Have who is to decode it take it over, with these parts; why it did not, None: it did."""
        wait_s = self._settings.transfer_s + MARGIN_S
        try:
            async with exported(self._tensors, parts, wait_s, self._settings.kv_checksum) as described:
                message = handed.model_copy(update={"parts": described})
                await self._bus.request(TAKE_OVER, message, handed.request.decode, deadline_s=wait_s)
            self.sent_bytes += bytes_in(described)
            return None
        except NobodyThere as error:
            return Failure(stage=Stage.DECODE, code="nobody_there", message=str(error), retryable=True)
        except RemoteFailure as refused:
            return refused.failure
        except (BusError, TensorError) as error:
            return Failure(stage=Stage.DECODE, code="not_taken_over", message=str(error), retryable=True)
