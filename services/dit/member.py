"""A DiT worker's part in a group, on its compute thread: enter, hand over or take the state, step together, leave.

Alone, a worker has no group and exchanges nothing. In a group all members make the same calls in the same order; what
comes next is the leader's to say, once before each step.
"""

from dataclasses import dataclass

from torch import Tensor

from common.messages.video import Lease, VideoRequest
from common.models.opensora.join_state import JoinState, share_state
from common.models.opensora.parallel import Parallelism, ParallelSTDiT3
from common.models.opensora.pipeline import Denoiser, DenoisingRun
from common.parallel.errors import GroupBroken
from common.parallel.group import Group
from common.parallel.groups import Groups
from services.dit.checkpoints import take_step
from services.dit.interval import CheckpointInterval

# The leader's word before a step. Anything above is the epoch of the lease that all go over to.
GO_ON = 0
STOP = -1
# On entering, in place of the number of steps that all must have done.
_SHARE = -1


@dataclass
class HeldVideo:
    """A video between two steps, with what it takes to hand it to others. ``run`` alone changes."""

    job_id: str
    request: VideoRequest
    run: DenoisingRun
    text: Tensor
    negative: Tensor | None

    def state(self) -> JoinState:
        return JoinState.of(self.run, self.text, self.negative, fps=self.request.fps, frames=self.request.frames)


class GroupMember:
    """What this worker has of the job at hand. Used by the compute thread while a step or an exchange is under way.

    ``held`` stays as it is when a group breaks: the latent after the last whole step.
    """

    def __init__(self, denoiser: Denoiser, groups: Groups, parallelism: Parallelism) -> None:
        self._denoiser = denoiser
        self._groups = groups
        self._parallel = ParallelSTDiT3(denoiser.model)
        self._parallelism = parallelism
        self._group: Group | None = None
        self.held: HeldVideo | None = None

    @property
    def video(self) -> HeldVideo:
        """The video at hand; there is one."""
        if self.held is None:
            raise RuntimeError("there is no video at hand")
        return self.held

    @property
    def run(self) -> DenoisingRun:
        return self.video.run

    def held_of(self, lease: Lease) -> HeldVideo | None:
        """What this worker has of the lease's job, if anything."""
        held = self.held
        return held if held is not None and (held.job_id, held.request) == (lease.job_id, lease.request) else None

    def drop(self) -> None:
        """Forget the video; the group is left as all others leave it."""
        self.held = None
        self._group = None

    def close(self) -> None:
        """Leave where the others do not: they get `GroupBroken` at once."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def lead_into(self, lease: Lease, share: bool) -> None:
        """Enter the lease's group as its leader. ``share``: give all others the state, whatever they have.

        Raises:
            GroupBroken: somebody did not come.
        """
        self._group = None
        if len(lease.members) == 1:
            return
        group = self._groups.enter(lease.members, lease.meeting, lease.epoch)
        self._group = group
        group.agree(_SHARE if share else self.run.steps_done)
        if share:
            share_state(group, 0, self.video.state())

    def follow_into(self, lease: Lease) -> None:
        """Enter the lease's group as one of the others, and take what its leader gives.

        Raises:
            GroupBroken: somebody did not come, or this worker does not stand where the leader stands.
        """
        self._group = None
        group = self._groups.enter(lease.members, lease.meeting, lease.epoch)
        self._group = group
        steps_done = group.agree(0)
        if steps_done == _SHARE:
            self._take(lease, share_state(group, 0, None))
        elif (held := self.held_of(lease)) is None or held.run.steps_done != steps_done:
            self.close()
            raise GroupBroken(lease.members, f"this member does not have the latent after step {steps_done}")

    def tell(self, word: int) -> None:
        """As the leader, say what comes next, where there is anybody to hear it. Raises GroupBroken."""
        if self._group is not None:
            self._group.agree(word)

    def switch(self, lease: Lease, share: bool) -> None:
        """As the leader, go over to a newer lease together with those who stay. Raises GroupBroken."""
        self.tell(lease.epoch)
        self.lead_into(lease, share)

    def lead_step(self, interval: CheckpointInterval) -> Tensor | None:
        """Take the next step with the group, if there is one; the latent's copy where it is to be kept.

        Raises:
            GroupBroken: the step is lost, the latent before it is not.
        """
        if self._group is None:
            return take_step(self.run, interval)
        self._group.agree(GO_ON)
        return take_step(self.run, interval, self._parallel.on(self._group, self._parallelism))

    def follow_step(self) -> int:
        """Hear the leader's word, and take the step with it if it goes on. Raises GroupBroken as `lead_step` does."""
        if self._group is None:
            raise RuntimeError("there is no group to follow")
        word = self._group.agree(GO_ON)
        if word == GO_ON:
            self.run.step(self._parallel.on(self._group, self._parallelism))
        return word

    def _take(self, lease: Lease, state: JoinState) -> None:
        """What the leader gave is the truth. What this worker had prepared for the same video stays of use."""
        if self.held_of(lease) is not None:
            self.run.latent = state.latent.to(self._denoiser.device)
            self.run.steps_done = state.steps_done
            return
        run = state.resume(self._denoiser)
        self.held = HeldVideo(lease.job_id, lease.request, run, state.text, state.negative)
