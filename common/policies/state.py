"""What a scheduler policy knows: the jobs in the order they arrived, and the slots."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from common.messages.cluster import Service


class Phase(StrEnum):
    """Where an admitted job stands. ``ENCODED`` waits for GPUs, ``DENOISED`` for a VAE."""

    WAITING = "waiting"
    ENCODING = "encoding"
    ENCODED = "encoded"
    DENOISING = "denoising"
    DENOISED = "denoised"
    DECODING = "decoding"


@dataclass(slots=True)
class Job:
    """One admitted job. ``slots`` are held by it now, the master first."""

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

    @property
    def workers(self) -> tuple[str, ...]:
        """The instances whose loss would cost this job its attempt."""
        return (*self.members, *(name for name in (self.encoder, self.decoder) if name is not None))


@dataclass(slots=True)
class Slot:
    """One GPU: at most one DiT and one VAE worker stand on it, and at most one job holds it."""

    number: int
    dit: str | None = None
    vae: str | None = None
    job_id: str | None = None


@dataclass(slots=True)
class ClusterState:
    """Jobs, slots and encoders. The methods keep the books: a slot is held by one job or by none."""

    jobs: dict[str, Job] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    encoders: list[str] = field(default_factory=list)

    def in_phase(self, phase: Phase) -> Iterator[Job]:
        """Jobs in ``phase``, first come first."""
        waiting = [job for job in self.jobs.values() if job.phase is phase]
        return iter(sorted(waiting, key=lambda job: (job.arrival_s, job.job_id)))

    def free_for_denoising(self) -> list[Slot]:
        """Slots with a DiT worker that no job holds, lowest number first."""
        return [slot for _, slot in sorted(self.slots.items()) if slot.dit and slot.job_id is None]

    def free_for_decoding(self) -> list[Slot]:
        """Slots with a VAE worker that no job holds, lowest number first."""
        return [slot for _, slot in sorted(self.slots.items()) if slot.vae and slot.job_id is None]

    def hold(self, job: Job, slots: tuple[int, ...]) -> None:
        """Give the job exactly these slots; those it held beside are free again."""
        for number in job.slots:
            self.slots[number].job_id = None
        for number in slots:
            holder = self.slots[number].job_id
            if holder is not None:
                raise ValueError(f"slot {number} is held by {holder}, it cannot go to {job.job_id}")
            self.slots[number].job_id = job.job_id
        job.slots = slots

    def worker_joined(self, instance: str, service: Service, slot: int | None) -> None:
        if service is Service.ENCODER:
            if instance not in self.encoders:
                self.encoders.append(instance)
            return
        if slot is None or service not in (Service.DIT, Service.VAE):
            return
        place = self.slots.setdefault(slot, Slot(slot))
        if service is Service.DIT:
            place.dit = instance
        else:
            place.vae = instance

    def worker_draining(self, instance: str) -> None:
        """Give the worker nothing new."""
        if instance in self.encoders:
            self.encoders.remove(instance)
        for slot in self.slots.values():
            if slot.dit == instance:
                slot.dit = None
            if slot.vae == instance:
                slot.vae = None

    def jobs_on(self, instance: str) -> list[Job]:
        """The jobs whose attempt would go with this worker."""
        return [job for job in self.jobs.values() if instance in job.workers]
