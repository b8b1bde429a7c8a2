"""Kills processes of a running stack at moments of chance, each when all are there, and waits until they are back."""

import asyncio
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from common.messages.cluster import Member, MemberState
from common.runtime.membership import MembershipView
from loadgen.bench.process import BenchmarkError

_BACK_S = 180.0
_LOOK_S = 0.02
# How many answers come between a stack that is whole and the next kill, and how long it falls after something is asked.
_MOST_ANSWERS = 6
_MOST_PAUSE_S = 0.05
# A supervisor gives up on what dies more often in that time.
_MOST_DEATHS = 3
_WINDOW_S = 30.0


class Traffic(Protocol):
    """What is asked of the stack: ``answered`` so far, and ``under_way`` now."""

    answered: int
    under_way: int


class Killer:
    """``victims`` die in turn, in an order that changes from turn to turn.

    Args:
        view: of the members, while it runs.
    """

    def __init__(self, view: MembershipView, victims: Sequence[str], chance: random.Random, traffic: Traffic) -> None:
        self._view = view
        self._victims = list(victims)
        self._chance = chance
        self._traffic = traffic
        self._killed: dict[str, str] = {}
        self._deaths_s = {victim: deque[float](maxlen=_MOST_DEATHS) for victim in victims}

    async def run(self, kills: int) -> list[str]:
        """Kill so many; returns whom, once all are back.

        Raises:
            BenchmarkError: one does not come back, or answers do not go on.
        """
        done: list[str] = []
        while len(done) < kills:
            for victim in self._chance.sample(self._victims, len(self._victims))[: kills - len(done)]:
                await self._one(victim)
                done.append(victim)
        await self.all_back()
        return done

    async def all_back(self) -> None:
        """Return once every victim is ready, in a later life than that which was ended here."""
        await self._until(lambda: all(map(self._ready, self._victims)), "not all came back")

    async def _one(self, victim: str) -> None:
        deaths_s = self._deaths_s[victim]
        if len(deaths_s) == _MOST_DEATHS:
            await asyncio.sleep(deaths_s[0] + _WINDOW_S - time.monotonic())
        await self.all_back()
        moment = self._traffic.answered + self._chance.randrange(_MOST_ANSWERS)
        await self._until(lambda: self._traffic.answered >= moment and self._traffic.under_way > 0, "no answers came")
        await asyncio.sleep(self._chance.choice((0.0, _MOST_PAUSE_S)) * self._chance.random())
        await self._until(lambda: self._ready(victim), f"{victim} went by itself")
        member = self._view.members[victim]
        self._killed[victim] = member.incarnation
        deaths_s.append(time.monotonic())
        os.kill(member.pid, signal.SIGKILL)
        print(
            f"  killed {victim} after {self._traffic.answered} answers, {self._traffic.under_way} under way", flush=True
        )

    def _ready(self, name: str) -> bool:
        member: Member | None = self._view.members.get(name)
        if member is None or member.state is not MemberState.READY:
            return False
        return member.incarnation != self._killed.get(name)

    async def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        try:
            async with asyncio.timeout(_BACK_S):
                while not holds():  # noqa: ASYNC110 - members and answers come by themselves
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            missing = [name for name in self._victims if not self._ready(name)]
            raise BenchmarkError(f"{otherwise} within {_BACK_S:g} s; missing: {', '.join(missing) or 'none'}") from None
