"""One video in the simulator: where it stands, and the steps it takes between two changes of its lease."""

from common.policies.video.decisions import GrantLease, ParkJob
from common.policies.video.rib import VideoKind


class Video:
    """Mutable and slotted: a simulated day has hundreds of thousands.

    While ``running``, step ``base + k`` ends at ``start_s + k * step_s``. ``told`` is the last step the policy heard
    of, and before ``next_news_s`` there is no other. ``version`` counts the changes that make events in the heap void.
    """

    __slots__ = (
        "base",
        "decode_factor",
        "epoch",
        "gpu_seconds",
        "job_id",
        "kind",
        "members",
        "next_news_s",
        "number",
        "pending",
        "running",
        "slots",
        "slots_since_s",
        "start_s",
        "step",
        "step_factor",
        "step_s",
        "steps",
        "told",
        "version",
        "worked_on",
    )

    def __init__(
        self, number: int, job_id: str, kind: VideoKind, steps: int, step_factor: float, decode_factor: float
    ) -> None:
        self.number = number
        self.job_id = job_id
        self.kind = kind
        self.steps = steps
        self.step_factor = step_factor
        self.decode_factor = decode_factor
        self.step = 0
        self.told = 0
        self.epoch = 0
        self.version = 0
        self.running = False
        self.pending: GrantLease | ParkJob | None = None
        self.members: tuple[str, ...] = ()
        self.worked_on: tuple[int, ...] = ()
        self.base = 0
        self.start_s = 0.0
        self.step_s = 0.0
        self.next_news_s = 0.0
        self.slots: tuple[int, ...] = ()
        self.slots_since_s = 0.0
        self.gpu_seconds = 0.0

    def end_of_step(self, step: int) -> float:
        return self.start_s + (step - self.base) * self.step_s

    def step_at(self, now_s: float) -> int:
        """The last step that has ended by ``now_s``, by the very sums that ``end_of_step`` gives."""
        step = self.base + int((now_s - self.start_s) / self.step_s)
        if self.end_of_step(step + 1) <= now_s:
            step += 1
        elif self.end_of_step(step) > now_s:
            step -= 1
        return max(self.base, min(step, self.steps))
