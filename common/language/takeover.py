"""The decode instance's end of a hand-over: it allocates blocks, fetches into them, compares checksums, and goes on.

Every transfer ends in one of three ways, each before its deadline: ``taken``, ``recomputed`` here from the first token
(the bytes did not come, came damaged, or there was no room for them), or ``dropped`` because nobody wants it any more.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog

from common.engine import Engine
from common.language.blocks import checksum, fetch_blocks, runs_of
from common.language.held import Held, Sequences
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.allocator import Access
from common.messages.chat import TakeOver
from common.models.causal_lm import BLOCK_TOKENS, BlockTable
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

log = structlog.get_logger()


class NotTransferred(Exception):
    """The keys and values are not here; the text says why."""


@dataclass(frozen=True, slots=True)
class _Reserved:
    """Blocks for a sequence that is on its way; ``access`` keeps those that are written to from being given out."""

    blocks: list[int]
    access: Access


class Receiving:
    """Takes sequences over, any number at once. ``outcomes`` counts how transfers ended."""

    def __init__(
        self, tensors: Tensors, engine: Engine, stepper: Stepper, sequences: Sequences, settings: LanguageSettings
    ) -> None:
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._sequences = sequences
        self._settings = settings
        self.outcomes: Counter[str] = Counter()

    async def run(self, held: Held, handed: TakeOver) -> None:
        """Have the sequence go on here, with the keys and values from there if that can be."""
        deadline_s = asyncio.get_running_loop().time() + self._settings.transfer_s
        outcome = "recomputed"
        try:
            outcome = await self._transfer(held, handed, deadline_s)
        except (NotTransferred, TensorError) as error:
            log.warning("keys and values not taken", sequence=held.key, source=handed.prefill, reason=str(error))
            if not await self._stepper.between(partial(self._recompute, held)):
                outcome = "dropped"
        self.outcomes[outcome] += 1

    async def _transfer(self, held: Held, handed: TakeOver, deadline_s: float) -> str:
        # The token that is computed next needs a place too.
        tokens = len(held.prompt) + held.generated
        if (handed.kv_tokens, handed.block_tokens, handed.first_block) != (tokens - 1, BLOCK_TOKENS, 0):
            raise NotTransferred(f"{handed.kv_tokens} tokens in blocks of {handed.block_tokens} are not what is needed")
        layout = self._engine.pool.layout
        reserved = await self._reserve(layout.blocks_for(tokens), held, deadline_s)
        if reserved is None:
            return "dropped"
        adopted = False
        try:
            count = layout.blocks_for(tokens - 1)
            await self._fetch(handed, reserved.blocks[:count], deadline_s)
            adopted = await self._stepper.between(partial(self._adopt, held, reserved))
            return "taken" if adopted else "dropped"
        finally:
            # By now nothing writes to them any more.
            self._stepper.soon(partial(self._engine.allocator.end_access, reserved.access))
            if not adopted:
                self._stepper.soon(partial(self._engine.allocator.release, reserved.blocks))

    async def _reserve(self, count: int, held: Held, deadline_s: float) -> _Reserved | None:
        """Blocks as soon as there are enough; None once nobody wants the sequence. Raises: NotTransferred."""
        reserved = await self._stepper.until(partial(self._allocate, count, held), deadline_s)
        if reserved is None:
            raise NotTransferred(f"{count} blocks were not free in time")
        return reserved if isinstance(reserved, _Reserved) else None

    def _allocate(self, count: int, held: Held) -> _Reserved | Literal["unwanted"] | None:
        if not self._sequences.has(held):
            return "unwanted"
        blocks = self._engine.allocator.allocate(count)
        return None if blocks is None else _Reserved(blocks, self._engine.allocator.begin_access(blocks))

    async def _fetch(self, handed: TakeOver, blocks: list[int], deadline_s: float) -> None:
        left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
        pool = self._engine.pool
        await fetch_blocks(self._tensors, pool, handed.kv, blocks, left_s)
        if handed.checksum is not None and self._settings.kv_checksum:
            value = await asyncio.to_thread(checksum, runs_of(pool, BlockTable(blocks), len(blocks)))
            if value != handed.checksum:
                raise NotTransferred(f"their checksum is {value:#010x}, not {handed.checksum:#010x}")

    def _adopt(self, held: Held, reserved: _Reserved) -> bool:
        if not self._sequences.has(held):
            return False
        now_s = asyncio.get_running_loop().time()
        self._engine.adopt(held.key, held.asked(park=False), reserved.blocks, now_s)
        return True

    def _recompute(self, held: Held) -> bool:
        if not self._sequences.has(held):
            return False
        self._engine.add(held.key, held.asked(park=False), asyncio.get_running_loop().time())
        return True
