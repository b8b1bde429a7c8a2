"""An instance changes its roles while it works (TetriInfer, section 3.5).

A role is a variable and a line in the membership record: nothing is loaded, and nothing that runs is stopped. From the
moment that it is told, an instance takes nothing new of a role that it gives up; prompts that wait go back to their
gateways to be routed anew, those that hold blocks already are computed to their end and handed over as ever, and what
decodes is handed on (``moving``).
"""

import time
from collections.abc import Awaitable, Callable

import structlog

from common.bus.errors import BusError, Refusal
from common.bus.port import Bus
from common.language.moving import MovingOn
from common.language.tasks import Spawn
from common.messages.cluster import FlipRole, LanguageRole, RoleFlipped
from common.messages.failures import Failure, Stage
from common.messages.subjects import ROLE_FLIPPED
from common.runtime.membership import Registration

log = structlog.get_logger()


class Roles:
    """What an instance does now.

    ``changed`` is called after each change; ``give_back`` has prompts that wait here routed anew.
    """

    def __init__(
        self,
        instance: str,
        bus: Bus,
        moving: MovingOn,
        changed: Callable[[], None],
        give_back: Callable[[], Awaitable[None]],
        spawn: Spawn,
    ) -> None:
        self._instance = instance
        self._bus = bus
        self._moving = moving
        self._changed = changed
        self._give_back = give_back
        self._spawn = spawn
        self._registration: Registration | None = None
        self._changing = False
        self.now: tuple[LanguageRole, ...] = tuple(LanguageRole)

    def announced(self, registration: Registration) -> None:
        """The instance has joined, with the roles that its record has."""
        self._registration = registration
        self.now = registration.member.roles

    async def flip(self, asked: FlipRole) -> RoleFlipped:
        """Take other roles, and answer once everybody can know.

        Raises:
            Refusal: it has not joined, changes already, or is not known to have announced the change: then its record
                decides, and it takes what either brings.
        """
        began_s = time.perf_counter()
        registration = self._registration
        if registration is None or not asked.roles or self._changing:
            raise self._refusal("it has not joined, changes its roles already, or to none")
        former, self.now, self._changing = self.now, asked.roles, True
        try:
            if asked.roles != former:
                await registration.change_roles(asked.roles)
        except BusError as error:
            self.now = tuple(dict.fromkeys((*former, *asked.roles)))
            self._changed()
            raise self._refusal(f"not announced: {error}") from error
        finally:
            self._changing = False
        flip_s = time.perf_counter() - began_s
        log.info("role flipped", before=former, now=asked.roles, seconds=flip_s)
        flipped = RoleFlipped(instance=self._instance, roles=asked.roles, flip_s=flip_s)
        self._spawn(self._let_go(asked, flipped), "flip")
        return flipped

    async def _let_go(self, asked: FlipRole, flipped: RoleFlipped) -> None:
        """What is left of the former roles goes elsewhere. That takes its time, and nobody waits for it."""
        if LanguageRole.DECODE in asked.roles:
            self._moving.end()
        else:
            self._moving.begin(asked.decode)
        self._changed()
        if LanguageRole.PREFILL not in asked.roles:
            await self._give_back()
        try:
            await self._bus.publish(ROLE_FLIPPED, flipped, self._instance)
        except BusError as error:
            log.warning("flip not counted", reason=str(error))

    def _refusal(self, reason: str) -> Refusal:
        failure = Failure(stage=Stage.DECODE, code="not_flipped", message=f"{self._instance}: {reason}", retryable=True)
        return Refusal(failure)
