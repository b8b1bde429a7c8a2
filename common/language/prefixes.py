"""Keys and values of first tokens on their way between the memories of instances, for whoever comes next."""

from functools import partial

import structlog

from common.bus.errors import BusError, Refusal
from common.bus.port import Bus
from common.engine import Engine
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.mempool.transfer import BlockTransfer, TransferFlags
from common.messages.failures import Failure, Stage
from common.messages.mempool import MatchPrefix, PrefixMatched, SendPrefix
from common.messages.subjects import MATCH_PREFIX
from common.tensors.errors import TensorError

log = structlog.get_logger()


async def prefix_at(bus: Bus, instance: str, tokens: bytes, deadline_s: float) -> int:
    """Of how many of these tokens an instance has keys and values, as far as it says in time."""
    try:
        matched = await bus.request(MATCH_PREFIX, MatchPrefix(tokens=tokens), instance, deadline_s=deadline_s)
    except BusError as error:
        log.info("prefix not known", instance=instance, reason=str(error))
        return 0
    return min(matched.tokens, len(tokens) // KEY_BYTES * BLOCK_TOKENS)


class SendingPrefixes:
    """Says what is here of some tokens, and sends it to who lacks it."""

    def __init__(
        self, bus: Bus, engine: Engine, stepper: Stepper, transfers: BlockTransfer, settings: LanguageSettings
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._stepper = stepper
        self._transfers = transfers
        self._deadline_s = settings.transfer_s
        self._flags = TransferFlags.CHECK if settings.kv_checksum else TransferFlags.NONE

    async def match(self, asked: MatchPrefix) -> PrefixMatched:
        """Answer what is here of some tokens; it counts as used."""
        blocks = await self._stepper.between(partial(self._engine.memory.use, asked.tokens))
        return PrefixMatched(tokens=blocks * BLOCK_TOKENS)

    async def answer(self, asked: SendPrefix) -> PrefixMatched:
        """Send what somebody asks to have sent; of how many tokens that was.

        Raises:
            Refusal: it was not taken.
        """
        try:
            blocks = await self.send(asked.to, asked.tokens)
        except (BusError, TensorError) as error:
            failure = Failure(stage=Stage.PREFILL, code="not_sent", message=str(error), retryable=True)
            raise Refusal(failure) from error
        return PrefixMatched(tokens=blocks * BLOCK_TOKENS)

    async def send(self, instance: str, tokens: bytes) -> int:
        """Send an instance what it lacks of what is here of ``tokens``, from the first on; how many blocks it were.

        Raises:
            BusError, TensorError: it was not taken.
        """
        known = await prefix_at(self._bus, instance, tokens, self._deadline_s) // BLOCK_TOKENS
        held = await self._stepper.between(partial(self._engine.memory.match, tokens, hold=True))
        try:
            if len(held) <= known:
                return 0
            beginning = tokens[: len(held) * KEY_BYTES]
            moved = await self._transfers.transfer_with_insert(instance, beginning, held[known:], flags=self._flags)
            return len(moved)
        finally:
            self._stepper.soon(partial(self._engine.memory.free_mem, held))
