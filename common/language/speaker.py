"""Tells gateways what came of their sequences: one message for each step and gateway, not one for each token."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.chat import SequenceTokens, TokensGenerated
from common.messages.subjects import TOKENS_GENERATED

log = structlog.get_logger()


class Crowd(NamedTuple):
    """How many wait for blocks now, and how many have had to give theirs up so far."""

    waiting: int
    preemptions: int


class Speaker:
    """What is heard at most once: a gateway finds out by itself what it missed."""

    def __init__(self, bus: Bus, instance: str, crowd: Callable[[], Crowd]) -> None:
        self._bus = bus
        self._instance = instance
        self._crowd = crowd
        self._turn = asyncio.Lock()

    async def tell(self, news: dict[str, list[SequenceTokens]]) -> None:
        """``news`` by gateway."""
        async with self._turn:
            waiting, preemptions = self._crowd()
            for gateway, sequences in news.items():
                message = TokensGenerated(
                    instance=self._instance, sequences=tuple(sequences), waiting=waiting, preemptions=preemptions
                )
                try:
                    await self._bus.publish(TOKENS_GENERATED, message, gateway)
                except BusError as error:
                    log.warning("tokens not sent", gateway=gateway, reason=str(error))

    async def told(self) -> None:
        """Return once all is sent that was to be told before."""
        async with self._turn:
            pass
