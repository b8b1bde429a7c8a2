"""One sequence's keys and values on their way into this pool: blocks that are its own before it is here."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial

from common.engine import Engine
from common.language.blocks import fetch_part
from common.language.stepper import Stepper
from common.mempool.address import KEY_BYTES, Address
from common.mempool.allocator import Access
from common.messages.chat import KVPart
from common.models.causal_lm import BLOCK_TOKENS, BlockTable
from common.tensors.port import Tensors


class NotTransferred(Exception):
    """The keys and values are not here; the text says why."""


class Lack(Enum):
    """Why there are no blocks now: too few are to be had, or those that were here are no more."""

    NO_ROOM = auto()
    EVICTED = auto()


class Arriving:
    """Blocks for ``tokens`` tokens and the one that is computed next; of the first of them there may be some here.

    The access that it holds keeps blocks that are written to from being given out, whatever happens to their holder.

    Attributes:
        offers: how often it was filled.
        filling: whether something is written to its blocks.
    """

    def __init__(
        self,
        engine: Engine,
        stepper: Stepper,
        request_id: str,
        epoch: int,
        tokens: int,
        expected_tokens: int,
        before: list[Address],
        new: list[Address],
    ) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.offers = 0
        self.filling = False
        self._engine = engine
        self._stepper = stepper
        self._tokens = tokens
        self._held = [*before, *new]
        self._table = BlockTable(address.block for address in self._held)
        self._access: Access | None = engine.allocator.begin_access(address.block for address in new)
        # So many tokens of each layer are here.
        self._arrived = [len(before) * BLOCK_TOKENS] * engine.pool.layout.layers
        self._awaited = engine.await_one(tokens + 1, expected_tokens, self._clock())
        self._gone = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> list[Address]:
        return self._held

    @classmethod
    def reserve(
        cls,
        engine: Engine,
        stepper: Stepper,
        request_id: str,
        epoch: int,
        tokens: int,
        expected_tokens: int,
        known: bytes = b"",
    ) -> "Arriving | Lack":
        """Between two steps, and if the engine's rules let it in.

        Args:
            expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.
            known: the first of the tokens, packed, in whole blocks: those are not sent, as they were here.
        """
        memory = engine.memory
        before = memory.match(known, hold=True)
        if len(before) * KEY_BYTES < len(known):
            memory.free_mem(before)
            return Lack.EVICTED
        if engine.refusal(tokens + 1, expected_tokens, len(before)) is not None:
            memory.free_mem(before)
            return Lack.NO_ROOM
        warm = memory.swap_in(before)
        new = None if warm is None else memory.alloc_mem(engine.pool.layout.blocks_for(tokens + 1) - len(before))
        if warm is None or new is None:
            memory.free_mem(before if warm is None else warm)
            return Lack.NO_ROOM
        return cls(engine, stepper, request_id, epoch, tokens, expected_tokens, warm, new)

    async def fill(self, parts: Sequence[KVPart], tensors: Tensors, deadline_s: float, check: bool) -> None:
        """Fetch these parts, of each layer the next tokens, by ``deadline_s`` (the loop's time).

        Raises:
            NotTransferred: they are not the next, came damaged, or nobody wants them any more.
            TensorError: they did not come.
        """
        self.expire_at(None)
        self._check_wanted()
        self.filling = True
        try:
            for part in parts:
                self._check_wanted()
                self._check_next(part)
                left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
                compared = check and part.checksum is not None
                value = await fetch_part(tensors, self._engine.pool, part, self._table, left_s, compared)
                if compared and value != part.checksum:
                    raise NotTransferred(f"their checksum is {value}, not {part.checksum}")
        finally:
            self.filling = False
            if self._gone:
                self._release()
        self.offers += 1

    def _check_wanted(self) -> None:
        if self._gone:
            raise NotTransferred("it was cancelled")

    def _check_next(self, part: KVPart) -> None:
        layers = range(len(self._arrived))
        if part.first_layer is not None:
            layers = layers[part.first_layer : part.first_layer + len(part.kv)]
        end = part.first_token + part.tokens
        if end > self._tokens or any(self._arrived[layer] != part.first_token for layer in layers):
            raise NotTransferred(f"tokens {part.first_token} to {end} are not the next")
        for layer in layers:
            self._arrived[layer] = end

    def check_whole(self) -> None:
        """Raises: NotTransferred: something has not come."""
        if min(self._arrived) < self._tokens:
            raise NotTransferred(f"only {min(self._arrived)} of {self._tokens} tokens came")

    def expire_at(self, deadline_s: float | None, expired: Callable[[], None] | None = None) -> None:
        """Call ``expired`` then (the loop's time), unless it is put off once more; None: never."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline_s is not None and expired is not None and not self._gone:
            self._timer = asyncio.get_running_loop().call_at(deadline_s, expired)

    def leave(self) -> None:
        """The blocks are the engine's from now on: whoever drops this, drops nothing. Between two steps."""
        self._gone = True
        self.expire_at(None)
        self._end_access()

    def drop(self) -> None:
        """Give the blocks back, as soon as nothing is written to them any more."""
        if not self._gone:
            self._gone = True
            self.expire_at(None)
            if not self.filling:
                self._release()

    def _release(self) -> None:
        self._stepper.soon(self._end_access)
        self._stepper.soon(partial(self._engine.memory.free_mem, self._held))

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()

    def _end_access(self) -> None:
        """Nothing comes into its blocks any more. Between two steps."""
        if self._access is not None:
            self._engine.await_no_more(self._awaited, self._clock())
            self._engine.allocator.end_access(self._access)
            self._access = None
