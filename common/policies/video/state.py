"""What a scheduler policy knows: the jobs by phase, and the slots."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from common.messages.cluster import Service
from common.policies.video.placement import Placement
from common.policies.video.rib import VideoKind, video_kind


class Phase(StrEnum):
    """Where an admitted job stands. ``ENCODED`` and ``PARKED`` wait for GPUs, ``DENOISED`` for a VAE."""

    WAITING = "waiting"
    ENCODING = "encoding"
    ENCODED = "encoded"
    PARKED = "parked"
    DENOISING = "denoising"
    DENOISED = "denoised"
    DECODING = "decoding"


@dataclass(slots=True, eq=False)
class Job:
    """One admitted job.

    ``slots`` are held by it now, the master first; ``lease`` are those of the newest lease and ``active`` those that
    the step under way runs on. They differ between a change of the lease and the step boundary at which it takes
    effect; ``leaving`` are the workers on held slots that the newest lease no longer has. ``holders`` are those of
    ``active`` whose workers are known to have the latent after ``step``. ``checkpoint`` is the newest
    step whose latent lies in the cache store, ``from_step`` the one at which the denoising under way began.
    ``last_step`` is DDiT's: the step at which the newest lease took effect.
    ``step_at_s`` is when ``step`` was done, or when the lease was granted. ``secured`` is the checkpoint with which an
    attempt was last lost that had come further than those before it, and ``forgiven`` the number of that attempt.
    """

    job_id: str
    arrival_s: float
    width: int
    height: int
    frames: int
    steps: int
    phase: Phase = Phase.WAITING
    attempt: int = 0
    epoch: int = 0
    step: int = 0
    encoder: str | None = None
    members: tuple[str, ...] = ()
    decoder: str | None = None
    slots: tuple[int, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    checkpoint: int = 0
    secured: int = 0
    forgiven: int = 0
    first_epoch: int = 0
    settled_epoch: int = 0
    lease: tuple[int, ...] = ()
    active: tuple[int, ...] = ()
    holders: tuple[int, ...] = ()
    leaving: tuple[str, ...] = ()
    from_step: int = 0
    parking: bool = False
    last_step: int = 0
    step_at_s: float = 0.0
    kind: VideoKind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = video_kind(self.width, self.height, self.frames)

    @property
    def settled(self) -> bool:
        """Whether the newest lease is the one that steps run under, and is to stay."""
        return self.settled_epoch == self.epoch and not self.parking

    @property
    def workers(self) -> tuple[str, ...]:
        """The instances whose loss would cost this job something."""
        return (*self.members, *self.leaving, *(name for name in (self.encoder, self.decoder) if name is not None))


@dataclass(slots=True)
class Slot:
    """One GPU: at most one DiT and one VAE worker stand on it, and at most one job holds it."""

    number: int
    dit: str | None = None
    vae: str | None = None
    job_id: str | None = None


@dataclass(slots=True)
class ClusterState:
    """Jobs, slots and encoders. The methods keep the books: a slot is held by one job or by none.

    ``encoders`` has the number of prompts that each is busy with.
    """

    placement: Placement = field(default_factory=Placement)
    jobs: dict[str, Job] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    encoders: dict[str, int] = field(default_factory=dict)
    by_phase: dict[Phase, dict[str, Job]] = field(default_factory=lambda: {phase: {} for phase in Phase})
    _slot_of: dict[str, int] = field(default_factory=dict)

    def in_phase(self, phase: Phase) -> Iterator[Job]:
        """Jobs in ``phase``, first come first. Sorts them, so not for phases with many jobs at every event."""
        return iter(sorted(self.by_phase[phase].values(), key=lambda job: (job.arrival_s, job.job_id)))

    def add(self, job: Job) -> None:
        self.jobs[job.job_id] = job
        self.by_phase[job.phase][job.job_id] = job

    def remove(self, job: Job) -> None:
        del self.jobs[job.job_id]
        del self.by_phase[job.phase][job.job_id]

    def move(self, job: Job, phase: Phase) -> None:
        del self.by_phase[job.phase][job.job_id]
        self.by_phase[phase][job.job_id] = job
        job.phase = phase

    def free_for_denoising(self) -> list[Slot]:
        """Slots with a DiT worker that no job holds, lowest number first."""
        return [self.slots[number] for number in self.placement.free_slots()]

    def free_for_decoding(self) -> list[Slot]:
        """Slots with a VAE worker that no job holds, lowest number first. Looks at every slot."""
        return [slot for _, slot in sorted(self.slots.items()) if slot.vae and slot.job_id is None]

    def hold(self, job: Job, slots: tuple[int, ...]) -> None:
        """Give the job exactly these slots; those it held beside are free again."""
        before = job.slots
        if slots == before:
            return
        every = self.slots
        for number in slots:
            if number not in before and every[number].job_id is not None:
                raise ValueError(f"slot {number} is held by {every[number].job_id}, it cannot go to {job.job_id}")
        freed, taken = [], []
        for number in before:
            if number not in slots:
                slot = every[number]
                slot.job_id = None
                if slot.dit is not None:
                    freed.append(number)
        for number in slots:
            if number not in before:
                slot = every[number]
                slot.job_id = job.job_id
                if slot.dit is not None:
                    taken.append(number)
        job.slots = slots
        if freed:
            self.placement.put(freed)
        if taken:
            self.placement.take(taken)

    def worker_joined(self, instance: str, service: Service, slot: int | None, server: str = "") -> None:
        if service is Service.ENCODER:
            self.encoders.setdefault(instance, 0)
            return
        if slot is None or service not in (Service.DIT, Service.VAE):
            return
        place = self.slots.get(slot)
        if place is None:
            place = self.slots[slot] = Slot(slot)
        self.placement.join(slot, server)
        self._slot_of[instance] = slot
        if service is Service.VAE:
            place.vae = instance
            return
        if place.dit is None and place.job_id is None:
            self.placement.put([slot])
        place.dit = instance

    def worker_draining(self, instance: str) -> None:
        """Give the worker nothing new."""
        self.encoders.pop(instance, None)
        slot = self.slots.get(self._slot_of.pop(instance, -1))
        if slot is None:
            return
        if slot.dit == instance:
            slot.dit = None
            if slot.job_id is None:
                self.placement.take([slot.number])
        if slot.vae == instance:
            slot.vae = None

    def jobs_on(self, instance: str) -> list[Job]:
        """The jobs that would lose something with this worker. Looks at all that are not waiting."""
        busy = [phase for phase in Phase if phase not in (Phase.WAITING, Phase.PARKED)]
        return [job for phase in busy for job in self.by_phase[phase].values() if instance in job.workers]
