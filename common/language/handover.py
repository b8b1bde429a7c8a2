"""The prefill instance's end of a hand-over: it offers a parked sequence's blocks and keeps them until they are taken.

MemServe, sections 4 and 6: with all layers at once after the prompt (by request, aggregated), or with what was not sent
while the prompt was computed (``ahead``).
"""

import asyncio
from functools import partial

from common.bus.errors import BusError, NobodyThere, RemoteFailure
from common.bus.port import Bus
from common.engine import Engine
from common.language.ahead import MARGIN_S, SendingAhead, Spawn
from common.language.blocks import Part, blocks_part, exported
from common.language.held import Held
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.allocator import Access
from common.messages.chat import TakeOver
from common.messages.failures import Failure, Stage
from common.messages.subjects import TAKE_OVER
from common.models.causal_lm import BLOCK_TOKENS, BlockTable
from common.tensors.errors import TensorError
from common.tensors.port import Tensors


class HandOver:
    """Hands parked sequences over, any number at once. ``ahead`` is what leaves before they are parked."""

    def __init__(
        self,
        instance: str,
        bus: Bus,
        tensors: Tensors,
        engine: Engine,
        stepper: Stepper,
        settings: LanguageSettings,
        spawn: Spawn,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._settings = settings
        self.ahead = SendingAhead(instance, bus, tensors, engine, stepper, settings, spawn)

    async def run(self, held: Held) -> Failure | None:
        """Hand a parked sequence over and free its blocks here, whatever comes of it.

        Returns:
            Why it was not taken over; None: it was.
        """
        opened = await self._stepper.between(partial(self._open, held))
        if opened is None:
            return None
        table, access = opened
        try:
            return await self._offer(held, table)
        finally:
            self._stepper.soon(partial(self._engine.allocator.end_access, access))
            self._stepper.soon(partial(self._engine.cancel, held.key, asyncio.get_running_loop().time()))

    def _open(self, held: Held) -> tuple[BlockTable, Access] | None:
        """The blocks; None: cancelled. Nobody writes to them while they are parked."""
        table = self._engine.parked(held.key)
        if table is None:
            return None
        count = self._engine.pool.layout.blocks_for(_kv_tokens(held))
        return BlockTable(table.blocks), self._engine.allocator.begin_access(table.blocks[:count])

    async def _offer(self, held: Held, table: BlockTable) -> Failure | None:
        wait_s = self._settings.transfer_s + MARGIN_S
        sent = await self.ahead.finish(held.key)
        parts: list[Part] = list(sent.parts)
        if sent.tokens < _kv_tokens(held):
            parts.append(blocks_part(self._engine.pool, table, sent.tokens, _kv_tokens(held)))
        try:
            async with exported(self._tensors, parts, wait_s, self._settings.kv_checksum) as described:
                message = TakeOver(
                    request=held.so_far(),
                    prefill=self._instance,
                    parts=described,
                    kv_tokens=_kv_tokens(held),
                    block_tokens=BLOCK_TOKENS,
                    offers=sent.offers,
                )
                await self._bus.request(TAKE_OVER, message, held.request.decode, deadline_s=wait_s)
            return None
        except NobodyThere as error:
            return Failure(stage=Stage.DECODE, code="nobody_there", message=str(error), retryable=True)
        except RemoteFailure as refused:
            return refused.failure
        except (BusError, TensorError) as error:
            return Failure(stage=Stage.DECODE, code="not_taken_over", message=str(error), retryable=True)
        finally:
            self.ahead.taken_over(held.key)


def _kv_tokens(held: Held) -> int:
    """Of so many tokens there are keys and values: of all but the last."""
    return len(held.prompt) + held.generated - 1
