"""The DiT process: one slot, at most one job at a time, alone or with others, one denoising step after the other.

Nothing in the step loop waits for the scheduler: steps are reported, not acknowledged, and a lease that was changed,
revoked or overtaken is noticed between two steps (DDiT: changes take effect at the next step boundary). Nor
does it wait for the cache store, to which the latent goes every few steps.
"""

import asyncio
from collections.abc import Sequence

import structlog
import torch

from common.bus.port import Subscription
from common.messages.cluster import Service
from common.messages.failures import Stage
from common.messages.subjects import GROUP_LOST
from common.messages.video import GroupLost, Lease
from common.models.opensora.pipeline import Denoiser
from common.parallel.errors import GroupBroken
from common.parallel.groups import Groups
from common.parallel.transport import BackendName
from common.runtime.leases import LeaseLost, Reporter
from common.runtime.worker import Equipment, choose_device, serve_worker
from services.dit.book import LeaseBook
from services.dit.checkpoints import CheckpointWriter
from services.dit.config import DitSettings
from services.dit.desk import LeaseDesk, Rest
from services.dit.follower import Follower
from services.dit.keeper import LatentKeeper
from services.dit.leader import Leader
from services.dit.member import GroupMember
from services.dit.start import JobStarter

log = structlog.get_logger()


class DitWorker:
    """Denoises for one lease after the other, as its leader or as one of the others."""

    def __init__(self, equipment: Equipment, denoiser: Denoiser, groups: Groups, settings: DitSettings) -> None:
        self._instance = equipment.instance
        self._bus = equipment.bus
        self._tensors = equipment.tensors
        self._regroup_s = settings.regroup_s
        self._reporter = Reporter(equipment.bus, Stage.DIT, equipment.instance)
        self._desk = LeaseDesk(equipment.bus, LeaseBook(equipment.instance), self._reporter)
        self._member = GroupMember(denoiser, groups, settings.parallelism)
        self._checkpoints = CheckpointWriter(equipment.bus, equipment.tensors)
        starter = JobStarter(equipment, denoiser)
        self._leader = Leader(equipment, self._desk, self._member, starter, self._checkpoints, self._reporter, settings)
        self._follower = Follower(equipment.compute, self._desk, self._member)
        self._keeper = LatentKeeper(equipment.bus, equipment.tensors, self._desk, self._member)

    async def listen(self) -> Sequence[Subscription]:
        return *await self._desk.listen(), *await self._keeper.listen()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work(), name="leases")
            tasks.create_task(self._checkpoints.run(), name="checkpoints")

    async def finish(self) -> None:
        """The lease under way is done, its checkpoint is stored, and the VAE has fetched its latent, if it is to."""
        await self._desk.idle.wait()
        await self._checkpoints.idle.wait()
        # Looked at, not waited for: this happens once in a process's life, and the port promises no event for it.
        while self._tensors.exported_count:
            await self._leader.release_void()
            await asyncio.sleep(0.02)

    async def _work(self) -> None:
        rest: Rest | None = None
        while True:
            lease = await self._desk.next(rest)
            if lease is not None:
                self._desk.begin(lease)
                rest = await self._take_part(lease)
            elif rest is not None:
                await self._give_up(rest)
                rest = None
            await self._desk.end(rest)

    async def _take_part(self, lease: Lease) -> Rest | None:
        """Work under the lease and what follows from it; what is left of the job afterwards, if anything."""
        led = lease.leader == self._instance
        try:
            if led:
                await self._leader.lead(lease)
            elif await self._follower.follow(lease):
                return self._rest(owed=False, broken=False)
        except LeaseLost:
            # A scheduler that has just started takes everything back, and soon grants the same again.
            log.info("work let go", job=lease.job_id, epoch=lease.epoch)
            return self._rest(owed=False, broken=False)
        except GroupBroken as broken:
            return await self._left_over(led, broken)
        self._member.drop()
        return None

    async def _left_over(self, led: bool, broken: GroupBroken) -> Rest | None:
        """A group fell apart. Those left of it have the latent of the last whole step."""
        rest = self._rest(owed=led, broken=True)
        lease = rest.lease
        log.warning("group broken", job=lease.job_id, epoch=lease.epoch, reason=broken.reason)
        report = GroupLost(
            job_id=lease.job_id,
            epoch=lease.epoch,
            instance=self._instance,
            members=lease.members,
            reason=broken.reason,
        )
        await self._bus.publish(GROUP_LOST, report, lease.job_id)
        return rest if led or self._member.held is not None else None

    def _rest(self, owed: bool, broken: bool) -> Rest:
        until_s = asyncio.get_running_loop().time() + self._regroup_s
        return Rest(self._desk.current, owed, broken, until_s)

    async def _give_up(self, rest: Rest) -> None:
        """Nobody has asked for what was left of a job; the job goes on from its checkpoint."""
        self._member.drop()
        if not rest.owed:
            return
        message = "the group fell apart and no lease came for those who are left"
        try:
            await self._reporter.report_failure(
                lambda: self._desk.book.void(rest.lease), rest.lease, "group_broken", message, retryable=True
            )
        except LeaseLost:
            log.info("work let go", job=rest.lease.job_id, epoch=rest.lease.epoch)


async def serve(settings: DitSettings, stop: asyncio.Event) -> None:
    device = choose_device(settings)
    groups = Groups(
        settings.instance_of(Service.DIT),
        settings.meeting_host,
        backend=_backend(settings, device),
        device=device,
        exchange_timeout_s=settings.exchange_timeout_s,
        meeting_timeout_s=settings.meeting_timeout_s,
    )

    def make(equipment: Equipment, denoiser: Denoiser) -> DitWorker:
        return DitWorker(equipment, denoiser, groups, settings)

    try:
        await serve_worker(settings, stop, Service.DIT, Denoiser, make, groups.address)
    finally:
        groups.close()


def _backend(settings: DitSettings, device: torch.device) -> BackendName:
    if settings.collectives != "auto":
        return settings.collectives
    # NCCL does not take two members on one GPU.
    return "nccl" if device.type == "cuda" and torch.cuda.device_count() > 1 else "gloo"
