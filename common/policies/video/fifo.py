"""First come, first served, one GPU a video: the plainest policy, and a baseline for the others."""

from common.policies.video.decisions import Decision
from common.policies.video.policy import Policy


class Fifo(Policy):
    """Each free slot goes to the longest waiting video, the lowest number first."""

    name = "fifo"

    def schedule(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        ready = self.lanes[None].ready
        while (slot := self.state.placement.lowest()) is not None and (job := ready.first()) is not None:
            decisions.append(self.grant_lease(job, (slot,), now_s, f"first in the queue; slot {slot} is free"))
        return decisions
