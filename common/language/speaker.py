"""Tells gateways what came of their sequences: one message for each step and gateway, not one for each token."""

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.chat import SequenceTokens, TokensGenerated
from common.messages.subjects import TOKENS_GENERATED

log = structlog.get_logger()


class Speaker:
    """What is heard at most once: a gateway finds out by itself what it missed."""

    def __init__(self, bus: Bus, instance: str) -> None:
        self._bus = bus
        self._instance = instance

    async def tell(self, news: dict[str, list[SequenceTokens]]) -> None:
        """``news`` by gateway."""
        for gateway, sequences in news.items():
            message = TokensGenerated(instance=self._instance, sequences=tuple(sequences))
            try:
                await self._bus.publish(TOKENS_GENERATED, message, gateway)
            except BusError as error:
                log.warning("tokens not sent", gateway=gateway, reason=str(error))
