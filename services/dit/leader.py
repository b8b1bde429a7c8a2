"""Leading a job: step after step, alone or with a group, reporting each one and waiting for nobody.

Between two steps the leader looks what it has heard meanwhile (`LeaseBook.at_boundary`), tells its group, and goes on
(DDiT's engine controller).
"""

import contextlib
import time

import structlog
import torch

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.subjects import DENOISING_FINISHED, GROUP_CALLED, JOB_PARKED, STEP_FINISHED
from common.messages.tensors import TensorRef
from common.messages.video import DenoisingFinished, GroupCalled, JobParked, Lease, StepFinished
from common.parallel.errors import GroupBroken
from common.runtime.leases import LeaseLost, Reporter
from common.runtime.worker import Equipment
from common.tensors.errors import TensorError
from services.dit.book import GoOn, Park, Stop, Switch, Verdict
from services.dit.checkpoints import CheckpointWriter, Snapshot, copied, copy_cost_s
from services.dit.config import DitSettings
from services.dit.desk import LeaseDesk
from services.dit.interval import CheckpointInterval
from services.dit.member import STOP, GroupMember
from services.dit.start import JobStarter

log = structlog.get_logger()


class Leader:
    """Works off leases that this worker leads."""

    def __init__(
        self,
        equipment: Equipment,
        desk: LeaseDesk,
        member: GroupMember,
        starter: JobStarter,
        checkpoints: CheckpointWriter,
        reporter: Reporter,
        settings: DitSettings,
    ) -> None:
        self._instance = equipment.instance
        self._slot = equipment.slot or 0
        self._bus: Bus = equipment.bus
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._desk = desk
        self._member = member
        self._starter = starter
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._latent_lease_s = settings.latent_lease_s
        self._handed_over: tuple[Lease, TensorRef] | None = None
        self._checkpoint_steps = None if settings.checkpoint_steps == "auto" else settings.checkpoint_steps

    async def lead(self, lease: Lease) -> None:
        """Denoise and hand over, or park.

        Raises:
            LeaseLost: the job was taken away.
            GroupBroken: a member is gone; what this worker holds is the latent after the last whole step.
        """
        try:
            if await self._is_at_hand(lease):
                await self._denoise(lease)
        except TensorError as error:
            await self._fail(self._desk.current, "tensor_not_fetched", str(error), retryable=True)
        except (RuntimeError, ValueError) as error:
            # Out of memory and the like: there is no reason why it should go better elsewhere.
            log.exception("denoising failed", job=lease.job_id)
            await self._fail(self._desk.current, "denoising_failed", str(error), retryable=False)

    async def _is_at_hand(self, lease: Lease) -> bool:
        """Have the video between two steps: from the start, or from what this worker has kept of it.

        What it has from before it was taken away is as good as a checkpoint: the same steps give the same latent.
        """
        held = self._member.held_of(lease)
        if lease.text is not None:
            resume_at = lease.resume.step if lease.resume is not None else 0
            if held is None or held.run.steps_done < max(1, resume_at):
                self._member.drop()
                self._member.held = await self._starter.start(lease, lease.text)
            else:
                log.info("going on from what was kept", job=lease.job_id, step=held.run.steps_done)
                await self._starter.decline(lease)
        elif held is None:
            await self._fail(lease, "latent_lost", "the latent of the steps done is gone here", retryable=True)
            return False
        await self._gather(lease, lease.members[1:])
        await self._compute.run(self._member.lead_into, lease, True)
        return True

    async def _denoise(self, lease: Lease) -> None:
        run = self._member.run
        copy_s = await self._compute.run(copy_cost_s, run.latent)
        # On a CPU the store and the broker work on the cores that the steps are made on.
        cost_s = self._checkpoints.least_store_s if run.latent.device.type == "cpu" else 0.0
        interval = CheckpointInterval(copy_s, self._checkpoints.store_s, self._checkpoint_steps, cost_s)
        verdict = self._at_boundary(lease)
        while not run.finished:
            match verdict:
                case Stop():
                    await self._dismiss()
                    await self._secure(lease)
                    raise LeaseLost
                case Park():
                    await self._park(lease)
                    return
                case Switch(lease=newer):
                    await self._switch(lease, newer)
                    lease = newer
            started_at_s = time.time()
            latent = await self._compute.run(self._member.lead_step, interval)
            ended_at_s = time.time()
            if latent is not None:
                await self._checkpoints.caught_up()
            verdict = GoOn() if run.finished else self._at_boundary(lease)
            await self._report_step(lease, run.steps_done, (started_at_s, ended_at_s), verdict)
            # Not for a lease that was revoked meanwhile: a job that has ended would leave a checkpoint behind.
            if latent is not None and not self._desk.book.void(lease):
                self._checkpoints.offer(Snapshot(lease.job_id, lease.epoch, run.steps_done, latent))
        if len(lease.members) > 1:
            # The others are let go now: from here on only the checkpoint is left if this worker dies.
            await self._checkpoints.caught_up()
        self._desk.book.conclude()
        self._member.drop()
        await self._hand_over(lease, run.latent)

    async def _report_step(self, lease: Lease, step: int, span_s: tuple[float, float], verdict: Verdict) -> None:
        """Tell who listens of a step, and under which lease the next one runs. Nobody answers."""
        report = StepFinished(
            job_id=lease.job_id,
            epoch=lease.epoch,
            instance=self._instance,
            slots=lease.slots or (self._slot,),
            step=step,
            steps=lease.request.steps,
            started_at_s=span_s[0],
            ended_at_s=span_s[1],
            next_epoch=verdict.lease.epoch if isinstance(verdict, Switch) else None,
        )
        await self._bus.publish(STEP_FINISHED, report, lease.job_id)

    def _at_boundary(self, lease: Lease) -> Verdict:
        verdict = self._desk.book.at_boundary(lease)
        if isinstance(verdict, Switch) and not self._bus.connected and _joining(lease, verdict.lease):
            # They could not be called. The group goes on as it is until they can.
            return GoOn()
        return verdict

    async def _switch(self, lease: Lease, newer: Lease) -> None:
        """Go over to a newer lease with those who stay and those who come; who leaves just stops."""
        joining = _joining(lease, newer)
        self._desk.begin(newer)
        await self._gather(newer, joining)
        await self._compute.run(self._member.switch, newer, bool(joining))
        log.info("lease changed", job=newer.job_id, epoch=newer.epoch, members=len(newer.members))

    async def _gather(self, lease: Lease, others: tuple[str, ...]) -> None:
        """Call those who come. They have said that they are free, so this is no wait for anything but their way."""
        for instance in others:
            await self._bus.publish(GROUP_CALLED, GroupCalled(job_id=lease.job_id, epoch=lease.epoch), instance)

    async def _dismiss(self) -> None:
        """Have the group stop. One that falls apart over this has stopped as well."""
        with contextlib.suppress(GroupBroken):
            await self._compute.run(self._member.tell, STOP)

    async def _secure(self, lease: Lease) -> None:
        """A scheduler that starts took everything back: who goes on when this worker waits no more has a checkpoint."""
        run = self._member.run
        if run.steps_done and self._desk.book.taken_back(lease):
            latent = await self._compute.run(copied, run.latent)
            self._checkpoints.offer(Snapshot(lease.job_id, lease.epoch, run.steps_done, latent))

    async def _park(self, lease: Lease) -> None:
        """Bring the latent away and be free, with all members."""
        await self._dismiss()
        run = self._member.run
        self._desk.book.conclude()
        self._member.drop()
        # Without a step done there is nothing to keep: the job begins from its seed.
        if run.steps_done:
            latent = await self._compute.run(copied, run.latent)
            try:
                await self._checkpoints.keep(Snapshot(lease.job_id, lease.epoch, run.steps_done, latent))
            except BusError as error:
                message = f"the cache store did not take the latent: {error}"
                await self._fail(lease, "not_parked", message, retryable=True)
                return
        parked = JobParked(job_id=lease.job_id, epoch=lease.epoch, instance=self._instance, step=run.steps_done)
        await self._reporter.report(lambda: self._desk.book.void(lease), JOB_PARKED, parked)

    async def _hand_over(self, lease: Lease, latent: torch.Tensor) -> None:
        ref = self._tensors.export(latent, uses=1, lease_s=self._latent_lease_s)
        report = DenoisingFinished(job_id=lease.job_id, epoch=lease.epoch, instance=self._instance, latent=ref)
        try:
            await self._reporter.report(lambda: self._desk.book.void(lease), DENOISING_FINISHED, report)
        except LeaseLost:
            await self._tensors.release(ref)
            raise
        self._handed_over = (lease, ref)

    async def release_void(self) -> None:
        """Forget a final latent that nobody will fetch any more, its lease having been revoked since."""
        if self._handed_over is not None and self._desk.book.void(self._handed_over[0]):
            await self._tensors.release(self._handed_over[1])
            self._handed_over = None

    async def _fail(self, lease: Lease, code: str, message: str, *, retryable: bool) -> None:
        """Leave the group, if there is one, and tell the scheduler."""
        self._desk.book.conclude()
        self._member.close()
        self._member.drop()
        await self._reporter.report_failure(
            lambda: self._desk.book.void(lease), lease, code, message, retryable=retryable
        )


def _joining(lease: Lease, newer: Lease) -> tuple[str, ...]:
    return tuple(instance for instance in newer.members if instance not in lease.members)
