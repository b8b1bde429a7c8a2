"""Keys and values of first tokens on their way between the memories of instances, for whoever comes next."""

from functools import partial

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.engine import Engine
from common.language.settings import LanguageSettings
from common.language.stepper import Stepper
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.mempool.transfer import BlockTransfer, TransferFlags
from common.messages.mempool import MatchPrefix
from common.messages.subjects import MATCH_PREFIX

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
    """Sends what is here of some tokens to who lacks it."""

    def __init__(
        self, bus: Bus, engine: Engine, stepper: Stepper, transfers: BlockTransfer, settings: LanguageSettings
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._stepper = stepper
        self._transfers = transfers
        self._deadline_s = settings.transfer_s
        self._flags = TransferFlags.CHECK if settings.kv_checksum else TransferFlags.NONE

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
