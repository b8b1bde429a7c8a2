"""Flips roles of language instances while they work, as a scheduler would, only more often."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

from common.bus.errors import BusError
from common.bus.nats_bus import NatsBus
from common.bus.port import Bus
from common.messages.cluster import FlipRole, LanguageRole, RoleFlipped
from common.messages.subjects import FLIP_ROLE

_ANSWER_S = 60.0


async def flip(bus: Bus, instance: str, role: LanguageRole, decode: Sequence[str] = ()) -> RoleFlipped:
    """Have an instance take one role; ``decode``: who goes on with what it decodes."""
    asked = FlipRole(roles=(role,), decode=tuple(decode))
    return await bus.request(FLIP_ROLE, asked, instance, deadline_s=_ANSWER_S)


class Flipper:
    """``roles`` by instance, each role at two instances or more. ``flips`` are those that were done."""

    def __init__(self, bus: Bus, roles: dict[str, LanguageRole], period_s: float, seed: int = 1) -> None:
        self._bus = bus
        self.roles = roles
        self.period_s = period_s
        self._chance = random.Random(seed)
        self.flips: list[RoleFlipped] = []

    async def run(self) -> None:
        """Flip one after another until cancelled. One that dies of it or before is left as it is."""
        while True:
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * self.period_s)
            await self.one()

    async def one(self) -> str:
        """Flip one that is not the last of its role; who it is."""
        counts = {role: list(self.roles.values()).count(role) for role in LanguageRole}
        instance = self._chance.choice([name for name, role in self.roles.items() if counts[role] > 1])
        role = next(other for other in LanguageRole if other is not self.roles[instance])
        others = [name for name, has in self.roles.items() if has is LanguageRole.DECODE and name != instance]
        with contextlib.suppress(BusError):
            self.flips.append(await flip(self._bus, instance, role, others))
            self.roles[instance] = role
        return instance


@contextlib.asynccontextmanager
async def flipping(url: str, roles: dict[str, LanguageRole], period_s: float) -> AsyncIterator[Flipper]:
    """Flips while the block runs."""
    async with await NatsBus.connect(url, name="flipper") as bus:
        flipper = Flipper(bus, roles, period_s)
        running = asyncio.create_task(flipper.run())
        try:
            yield flipper
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
