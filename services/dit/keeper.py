"""What a worker keeps of a job that was taken from it, for whoever goes on with it.

A scheduler that starts takes everything back and grants the same jobs again, not always to the same workers. Those that
had a job keep the latent of its last whole step for some seconds, and hand it over when they are asked: so that no step
is done again, however long ago the last checkpoint was.
"""

from collections.abc import Sequence

from common.bus.port import Bus, Subscription
from common.messages.subjects import FIND_LATENT
from common.messages.video import FindLatent, LatentFound
from common.tensors.port import Tensors
from services.dit.desk import LeaseDesk
from services.dit.member import GroupMember

# Who was told of it fetches it at once.
LATENT_LEASE_S = 15.0


class LatentKeeper:
    """Answers ``FindLatent``."""

    def __init__(self, bus: Bus, tensors: Tensors, desk: LeaseDesk, member: GroupMember) -> None:
        self._bus = bus
        self._tensors = tensors
        self._desk = desk
        self._member = member

    async def listen(self) -> Sequence[Subscription]:
        return (await self._bus.serve(FIND_LATENT, self._find, self._desk.book.instance),)

    async def _find(self, request: FindLatent) -> LatentFound:
        let_go = await self._desk.let_go(request.job_id)
        held = self._member.held
        if not let_go or held is None or held.job_id != request.job_id or not held.run.steps_done:
            return LatentFound()
        ref = None
        if request.uses:
            ref = self._tensors.export(held.run.latent, uses=request.uses, lease_s=LATENT_LEASE_S)
        return LatentFound(step=held.run.steps_done, latent=ref)
