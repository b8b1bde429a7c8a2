"""Has language instances change their roles as a flip policy decides (TetriInfer, sections 3.2 and 3.5).

One flip is on its way at a time. From its decision on nothing is routed to the role that is left; a flip that is
refused, or whose instance dies, is forgotten, and its instance has the roles that its record says.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.cluster import FlipRole, MemberState
from common.messages.subjects import FLIP_ROLE
from common.policies.language.flip import FlipInstance, FlipPolicy
from common.runtime.membership import MembershipView
from services.scheduler.chat import ChatRouter

log = structlog.get_logger()

_PERIOD_S = 0.1
_ANSWER_DEADLINE_S = 5.0


class Flips:
    """``policy`` None: nobody flips."""

    def __init__(self, bus: Bus, chats: ChatRouter, view: MembershipView, policy: FlipPolicy | None) -> None:
        self._bus = bus
        self._chats = chats
        self._view = view
        self._policy = policy
        self._flipping = ""
        self._under_way: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask the policy while the block runs."""
        if self._policy is None:
            yield
            return
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._ask(self._policy, tasks), name="flips")
            try:
                yield
            finally:
                asking.cancel()
                if self._under_way is not None:
                    self._under_way.cancel()

    async def _ask(self, policy: FlipPolicy, tasks: asyncio.TaskGroup) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_PERIOD_S)
            loads = self._chats.loads(self._flipping)
            if self._under_way is not None and self._flipping and not any(load.flipping for load in loads):
                # It leaves, or is gone, and may never answer; another one is thought of when this one is forgotten.
                self._under_way.cancel()
                continue
            for flip in policy.handle(loads, clock(), self._chats.chats()):
                self._flipping = flip.instance
                self._under_way = tasks.create_task(self._carry_out(flip), name=f"flip {flip.instance}")

    async def _carry_out(self, flip: FlipInstance) -> None:
        log.info("flips", instance=flip.instance, role=flip.role, reason=flip.reason)
        self._chats.roles_changed(flip.instance, (flip.role,))
        asked = FlipRole(roles=(flip.role,), decode=tuple(self._chats.decoding(flip.instance)))
        try:
            flipped = await self._bus.request(FLIP_ROLE, asked, flip.instance, deadline_s=_ANSWER_DEADLINE_S)
            log.info("flipped", instance=flip.instance, role=flip.role, seconds=flipped.flip_s)
        except BusError as error:
            log.warning("not flipped", instance=flip.instance, role=flip.role, reason=str(error))
            member = self._view.members.get(flip.instance)
            if member is not None and member.state is MemberState.READY:
                self._chats.roles_changed(flip.instance, member.roles)
        finally:
            self._flipping = ""
