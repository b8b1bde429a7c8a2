"""Following a job: a worker that computes with a group and does what its leader says, and never leaves on its own."""

import structlog

from common.messages.video import Lease
from common.runtime.worker import ComputeThread
from services.dit.desk import LeaseDesk
from services.dit.member import GO_ON, STOP, GroupMember

log = structlog.get_logger()


class Follower:
    """Works off leases that another worker leads."""

    def __init__(self, compute: ComputeThread, desk: LeaseDesk, member: GroupMember) -> None:
        self._compute = compute
        self._desk = desk
        self._member = member

    async def follow(self, lease: Lease) -> bool:
        """Take part until the video is denoised, the leader says stop, or goes on without this worker.

        Revocations and newer leases are the leader's to obey: who stays away on its own leaves the others hanging.

        Returns whether what this worker holds may still be asked for: the leader stopped, or is done.

        Raises:
            GroupBroken: a member is gone; what this worker holds is the latent after the last whole step.
        """
        try:
            return await self._follow(lease)
        except (RuntimeError, ValueError):
            log.exception("following failed", job=lease.job_id, epoch=lease.epoch)
            # The leader is told by this, and tells the scheduler.
            self._member.close()
            self._member.drop()
            return False

    async def _follow(self, lease: Lease) -> bool:
        await self._compute.run(self._member.follow_into, lease)
        while not self._member.run.finished:
            word = await self._compute.run(self._member.follow_step)
            if word == GO_ON:
                continue
            if word == STOP:
                return True
            newer = self._desk.book.change(lease.job_id, word)
            if newer is None:
                log.info("left the group", job=lease.job_id, epoch=word)
                self._member.drop()
                return False
            lease = newer
            self._desk.begin(lease)
            await self._compute.run(self._member.follow_into, lease)
        # The final latent is the leader's to hand over, which may die before it has.
        return True
