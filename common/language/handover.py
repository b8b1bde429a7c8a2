"""The prefill instance's end of a hand-over: it offers a parked sequence's blocks and keeps them until they are taken.

MemServe, section 5: transfer by request, all layers at once. (By layer, while computing, is not done yet.)
"""

import asyncio
from functools import partial

import structlog
from torch import Tensor

from common.bus.errors import BusError, NobodyThere, RemoteFailure
from common.bus.port import Bus
from common.engine import Engine
from common.language.blocks import checksum, runs_of
from common.language.held import Held
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.allocator import Access
from common.messages.chat import TakeOver
from common.messages.failures import Failure, Stage
from common.messages.subjects import TAKE_OVER
from common.models.causal_lm import BLOCK_TOKENS
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

log = structlog.get_logger()

# The receiver gives up first, so that it never reads from blocks that are in use again.
_MARGIN_S = 2.0


class HandOver:
    """Hands parked sequences over, any number at once."""

    def __init__(
        self,
        instance: str,
        bus: Bus,
        tensors: Tensors,
        engine: Engine,
        stepper: Stepper,
        settings: LanguageSettings,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._settings = settings

    async def run(self, held: Held) -> Failure | None:
        """Hand a parked sequence over and free its blocks here, whatever comes of it.

        Returns:
            Why it was not taken over; None: it was.
        """
        opened = await self._stepper.between(partial(self._open, held))
        if opened is None:
            return None
        runs, access = opened
        try:
            return await self._offer(held, runs)
        finally:
            self._stepper.soon(partial(self._engine.allocator.end_access, access))
            self._stepper.soon(partial(self._engine.cancel, held.key, asyncio.get_running_loop().time()))

    def _open(self, held: Held) -> tuple[list[Tensor], Access] | None:
        """The blocks in place; None: cancelled. Nobody writes to them while they are parked."""
        table = self._engine.parked(held.key)
        if table is None:
            return None
        count = self._engine.pool.layout.blocks_for(len(held.prompt) + held.generated - 1)
        return runs_of(self._engine.pool, table, count), self._engine.allocator.begin_access(table.blocks[:count])

    async def _offer(self, held: Held, runs: list[Tensor]) -> Failure | None:
        wait_s = self._settings.transfer_s + _MARGIN_S
        refs = []
        try:
            value = await asyncio.to_thread(checksum, runs) if self._settings.kv_checksum else None
            refs = [self._tensors.export(run, lease_s=wait_s) for run in runs]
            message = TakeOver(
                request=held.so_far(),
                prefill=self._instance,
                kv=tuple(refs),
                kv_tokens=len(held.prompt) + held.generated - 1,
                block_tokens=BLOCK_TOKENS,
                checksum=value,
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
            for ref in refs:
                await self._tensors.release(ref)
