"""The decode instance's end of a hand-over: it allocates blocks, fetches into them, compares checksums, and goes on.

Every transfer ends in one of four ways, each before its deadline: ``taken``, ``recomputed`` here from the first token
(the bytes did not come, came damaged, or there was no room for them), ``refused`` for the same reasons where the
sequence can go on where it is, or ``dropped`` because nobody wants it any more.
What came ahead is kept for ``transfer_s`` at most without news of it.
"""

import asyncio
from collections import Counter
from functools import partial
from typing import Literal

import structlog

from common.bus.errors import Refusal
from common.engine import Engine
from common.language.arriving import Arriving, Lack, NotTransferred
from common.language.foretelling import Foretelling
from common.language.held import Held, Sequences
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.address import KEY_BYTES
from common.messages.chat import ExpectedAnswer, OfferKV, TakeOver, tokens_in
from common.messages.failures import Failure, Stage
from common.models.causal_lm import BLOCK_TOKENS
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

log = structlog.get_logger()


class Receiving:
    """Takes sequences over, any number at once. ``outcomes`` counts how transfers ended, ``offers`` what came ahead.

    ``waiting``: so many are to come and have no blocks yet; ``waiting_blocks``: so many they want.
    """

    def __init__(
        self,
        tensors: Tensors,
        engine: Engine,
        stepper: Stepper,
        sequences: Sequences,
        settings: LanguageSettings,
        foretelling: Foretelling,
    ) -> None:
        self._tensors = tensors
        self._engine = engine
        self._stepper = stepper
        self._sequences = sequences
        self._settings = settings
        self._foretelling = foretelling
        self._ahead: dict[str, Arriving] = {}
        self.waiting = 0
        self.waiting_blocks = 0
        self.outcomes: Counter[str] = Counter()
        self.offers: Counter[str] = Counter()

    # --- ahead ---------------------------------------------------------------------------------------------------

    async def offered(self, offer: OfferKV) -> None:
        """Fetch what a sequence that will be handed over has so far.

        Raises:
            Refusal: there is no room, it did not come, or it is not the next offer: then all of it comes at the end.
        """
        deadline_s = self._deadline_s()
        arriving = await self._stepper.between(partial(self._expected, offer))
        if not isinstance(arriving, Arriving):
            self.offers["refused"] += 1
            raise _refusal(arriving)
        taken = False
        try:
            await arriving.fill(offer.parts, self._tensors, deadline_s, self._settings.kv_checksum)
            taken = True
        except (NotTransferred, TensorError) as error:
            raise _refusal(str(error)) from error
        finally:
            self.offers["taken" if taken else "lost"] += 1
            if taken:
                arriving.expire_at(self._deadline_s(), partial(self._forget, arriving))
            else:
                self._forget(arriving)

    def _expected(self, offer: OfferKV) -> Arriving | str:
        """Where an offer goes, from its first on; otherwise why it goes nowhere. There is no waiting for blocks."""
        request_id, epoch = offer.request_id, offer.epoch
        if self._sequences.void(request_id, epoch):
            return f"epoch {epoch} of {request_id} is cancelled"
        if offer.block_tokens != BLOCK_TOKENS:
            return f"blocks of {offer.block_tokens} tokens are not what is needed"
        known = self._ahead.get(request_id)
        if offer.number:
            in_order = known is not None and (known.epoch, known.offers) == (epoch, offer.number) and not known.filling
            return known if known is not None and in_order else f"offer {offer.number} of {request_id} is not the next"
        if known is not None and known.epoch > epoch:
            return f"epoch {epoch} of {request_id} is not the newest"
        if known is not None:
            self._forget(known)
        expected = self._foretelling.likely_tokens(offer.kv_tokens, offer.expected)
        arriving = Arriving.reserve(self._engine, self._stepper, request_id, epoch, offer.kv_tokens, expected)
        if not isinstance(arriving, Arriving):
            return f"{offer.kv_tokens} tokens have no room here for now"
        self._ahead[request_id] = arriving
        return arriving

    def cancel(self, request_id: str, epoch: int) -> None:
        """Forget what came ahead of the sequence's epochs up to this one."""
        arriving = self._ahead.get(request_id)
        if arriving is not None and arriving.epoch <= epoch:
            self._forget(arriving)

    def _forget(self, arriving: Arriving) -> None:
        if self._ahead.get(arriving.request_id) is arriving:
            del self._ahead[arriving.request_id]
        arriving.drop()

    def _come_ahead(self, held: Held, handed: TakeOver) -> Arriving | None:
        """What the sequence brought before, if it is what the other side thinks it is."""
        arriving = self._ahead.pop(held.request.request_id, None)
        if arriving is None:
            return None
        if handed.offers and (arriving.epoch, arriving.offers) == (held.request.epoch, handed.offers):
            arriving.expire_at(None)
            return arriving
        arriving.drop()
        return None

    # --- at the end ----------------------------------------------------------------------------------------------

    async def run(self, held: Held, handed: TakeOver) -> None:
        """Have the sequence go on here, with the keys and values from there if that can be.

        Raises:
            Refusal: it cannot, and the sequence goes on where it is.
        """
        outcome = "recomputed"
        try:
            outcome = await self._transfer(held, handed, self._deadline_s())
        except (NotTransferred, TensorError) as error:
            if handed.running:
                self.outcomes["refused"] += 1
                raise _refusal(str(error)) from error
            log.warning("keys and values not taken", sequence=held.key, source=handed.prefill, reason=str(error))
            if not await self._stepper.between(partial(self._recompute, held, handed.expected)):
                outcome = "dropped"
        self.outcomes[outcome] += 1

    async def _transfer(self, held: Held, handed: TakeOver, deadline_s: float) -> str:
        arriving = self._come_ahead(held, handed)
        tokens = held.kv_tokens
        adopted = False
        try:
            if (handed.kv_tokens, handed.block_tokens) != (tokens, BLOCK_TOKENS):
                raise NotTransferred(f"{handed.kv_tokens} tokens in blocks of {handed.block_tokens} are not needed")
            if arriving is None:
                known = held.tokens[: handed.first_block * KEY_BYTES]
                expected = self._foretelling.expected_tokens(held, handed.expected)
                # What can go on where it is does not wait for blocks.
                until_s = self._clock() if handed.running else deadline_s
                arriving = await self._reserve(held, expected, known, until_s)
            if arriving is None:
                return "dropped"
            await arriving.fill(handed.parts, self._tensors, deadline_s, self._settings.kv_checksum)
            arriving.check_whole()
            adopted = await self._stepper.between(partial(self._adopt, held, arriving, handed.expected))
            return "taken" if adopted else "dropped"
        finally:
            if arriving is not None and not adopted:
                arriving.drop()

    async def _reserve(self, held: Held, expected_tokens: int, known: bytes, deadline_s: float) -> Arriving | None:
        """Blocks as soon as it may have them; None once nobody wants the sequence. Raises: NotTransferred."""
        blocks = self._engine.pool.layout.blocks_for(held.kv_tokens + 1)
        self.waiting += 1
        self.waiting_blocks += blocks
        try:
            reserved = await self._stepper.until(partial(self._allocate, held, expected_tokens, known), deadline_s)
        finally:
            self.waiting -= 1
            self.waiting_blocks -= blocks
        if reserved is None:
            raise NotTransferred(f"blocks for {held.kv_tokens} tokens were not free in time")
        if reserved is Lack.EVICTED:
            raise NotTransferred(f"the first {tokens_in(known)} tokens' are here no more")
        return reserved if isinstance(reserved, Arriving) else None

    def _allocate(self, held: Held, expected_tokens: int, known: bytes) -> Arriving | Lack | Literal["unwanted"] | None:
        if not self._sequences.has(held):
            return "unwanted"
        request = held.request
        reserved = Arriving.reserve(
            self._engine, self._stepper, request.request_id, request.epoch, held.kv_tokens, expected_tokens, known
        )
        return None if reserved is Lack.NO_ROOM else reserved

    def _adopt(self, held: Held, arriving: Arriving, told: ExpectedAnswer | None) -> bool:
        if not self._sequences.has(held):
            return False
        held.told = told
        expected = self._foretelling.expected_tokens(held, told)
        self._foretelling.count(told)
        self._engine.adopt(held.key, held.asked(park=False), arriving.held, self._clock(), expected)
        arriving.leave()
        return True

    def _recompute(self, held: Held, told: ExpectedAnswer | None) -> bool:
        if not self._sequences.has(held):
            return False
        expected = self._foretelling.expected_tokens(held, told)
        self._foretelling.count(told)
        self._engine.add(held.key, held.asked(park=False), self._clock(), expected)
        return True

    def _deadline_s(self) -> float:
        return self._clock() + self._settings.transfer_s

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()


def _refusal(reason: str) -> Refusal:
    return Refusal(Failure(stage=Stage.DECODE, code="not_taken", message=reason, retryable=True))
