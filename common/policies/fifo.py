"""First come, first served, one GPU a video: the plainest policy, and a baseline for the others."""

from typing import ClassVar

from common.policies.decisions import Decision
from common.policies.policy import Policy
from common.policies.state import Phase


class Fifo(Policy):
    """Each free slot goes to the longest waiting video.

    Prompts are encoded a little ahead, one for each slot, so that no slot waits for an encoder.
    """

    name: ClassVar[str] = "fifo"

    def schedule(self, now_s: float) -> list[Decision]:
        return [*self._denoise(), *self._encode()]

    def _denoise(self) -> list[Decision]:
        decisions: list[Decision] = []
        ready = self.state.in_phase(Phase.ENCODED)
        for slot, job in zip(self.state.free_for_denoising(), ready, strict=False):
            decisions.append(self.grant_lease(job, [slot], f"first in the queue; slot {slot.number} is free"))
        return decisions

    def _encode(self) -> list[Decision]:
        if not self.state.encoders:
            return []
        ahead = sum(job.phase in (Phase.ENCODING, Phase.ENCODED) for job in self.state.jobs.values())
        room = max(1, len(self.state.slots)) - ahead
        decisions: list[Decision] = []
        for job, _ in zip(self.state.in_phase(Phase.WAITING), range(room), strict=False):
            encoder = self._least_loaded_encoder()
            decisions.append(self.start_encoding(job, encoder, "next in the queue"))
        return decisions

    def _least_loaded_encoder(self) -> str:
        load = dict.fromkeys(self.state.encoders, 0)
        for job in self.state.in_phase(Phase.ENCODING):
            if job.encoder in load:
                load[job.encoder] += 1
        return min(load, key=lambda name: load[name])
