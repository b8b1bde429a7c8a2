"""The policy interface of the video scheduler, and the life of a job that every policy shares.

A policy is pure: events go in with the time they happened, decisions with a reason come out. The live scheduler
and the simulator drive the same classes. What differs between policies is ``schedule`` (who gets which slots) and,
for some, ``decode`` (where a finished latent is decoded).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from common.policies.decisions import (
    CancelDecoding,
    CompleteJob,
    Decision,
    FailJob,
    GrantLease,
    RequeueJob,
    RevokeLease,
    StartDecoding,
    StartEncoding,
)
from common.policies.events import (
    AttemptFailed,
    DecodingFinished,
    DenoisingFinished,
    Event,
    JobArrived,
    JobCancelled,
    PromptEncoded,
    StepFinished,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
)
from common.policies.state import ClusterState, Job, Phase, Slot

MAX_ATTEMPTS = 5


class Policy(ABC):
    """Base of the scheduling policies.

    Args:
        first_epoch: the epoch of the first lease; each later one is higher. A scheduler passes a number above
            anything its predecessors used, so that workers refuse leases from before it.
    """

    name: ClassVar[str]

    def __init__(self, first_epoch: int = 1) -> None:
        self.state = ClusterState()
        self.draining = False
        self._next_epoch = first_epoch

    @abstractmethod
    def schedule(self, now_s: float) -> list[Decision]:
        """Put waiting jobs on free slots. Called after every event but a step's end."""

    def handle(self, event: Event, now_s: float) -> list[Decision]:
        """Take in one event; returns what to do, in order. Events of an overtaken attempt or epoch change nothing.

        While ``draining`` is set, what runs goes on to its end and nothing new is started.
        """
        decisions = self._apply(event)
        if isinstance(event, StepFinished):
            return decisions
        decisions += self.decode()
        if not self.draining:
            decisions += self.schedule(now_s)
        return decisions

    def decode(self) -> list[Decision]:
        """Send finished latents to VAE workers: on the master's slot, all others being free again (DDiT, section 6).

        A master whose slot has no VAE worker goes on to other videos; its latent waits for a slot that has one.
        """
        decisions: list[Decision] = []
        for job in self.state.in_phase(Phase.DENOISED):
            own = [self.state.slots[number] for number in job.slots if self.state.slots[number].vae]
            if not own:
                self.state.hold(job, ())
            slot = next(iter(own or self.state.free_for_decoding()), None)
            if slot is not None:
                decisions.append(self.start_decoding(job, slot, f"denoised; slot {slot.number} has a VAE worker"))
        return decisions

    def watched(self) -> Iterable[str]:
        """The jobs whose last finished step the policy wants to know before anything else happens.

        A simulator may leave out the other jobs' step reports, unless a changed lease takes effect with them.
        """
        return ()

    def queue_places(self) -> dict[str, int]:
        """The jobs that have no GPU yet, by id: 1 for the one that starts denoising next."""
        order = [*self.state.in_phase(Phase.ENCODED), *self.state.in_phase(Phase.ENCODING)]
        order += self.state.in_phase(Phase.WAITING)
        return {job.job_id: place for place, job in enumerate(order, 1)}

    # --- the steps of a job's life, for ``schedule`` to choose from -----------------------------------------------

    def start_encoding(self, job: Job, encoder: str, reason: str) -> StartEncoding:
        job.phase = Phase.ENCODING
        job.attempt += 1
        job.encoder = encoder
        return StartEncoding(job.job_id, job.attempt, encoder, reason)

    def grant_lease(self, job: Job, slots: list[Slot], reason: str) -> GrantLease:
        members = tuple(slot.dit for slot in slots if slot.dit is not None)
        if len(members) != len(slots):
            raise ValueError("a lease needs a DiT worker on every slot")
        self.state.hold(job, tuple(slot.number for slot in slots))
        job.phase = Phase.DENOISING
        job.members = members
        job.epoch = self._take_epoch()
        return GrantLease(job.job_id, job.epoch, members, job.slots, reason)

    def start_decoding(self, job: Job, slot: Slot, reason: str) -> StartDecoding:
        if slot.vae is None:
            raise ValueError(f"slot {slot.number} has no VAE worker")
        self.state.hold(job, (slot.number,))
        job.phase = Phase.DECODING
        job.decoder = slot.vae
        return StartDecoding(job.job_id, job.epoch, slot.vae, slot.number, reason)

    # --- events ---------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> list[Decision]:
        match event:
            case WorkerJoined(instance, service, slot):
                self.state.worker_joined(instance, service, slot)
            case WorkerDraining(instance):
                self.state.worker_draining(instance)
            case WorkerLost(instance):
                self.state.worker_draining(instance)
                lost = self.state.jobs_on(instance)
                return [decision for job in lost for decision in self._retry(job, f"{instance} was lost")]
            case JobArrived():
                self._arrived(event)
            case JobCancelled(job_id):
                job = self.state.jobs.get(job_id)
                return self._stop(job, "cancelled") if job else []
            case AttemptFailed(job_id, attempt, reason, retryable):
                job = self.state.jobs.get(job_id)
                if job is not None and job.attempt == attempt and job.phase is not Phase.WAITING:
                    return self._retry(job, reason) if retryable else self._give_up(job, reason)
            case _:
                return self._progressed(event)
        return []

    def _arrived(self, event: JobArrived) -> None:
        if event.job_id not in self.state.jobs:
            self.state.jobs[event.job_id] = Job(
                event.job_id,
                event.arrival_s,
                event.width,
                event.height,
                event.frames,
                event.steps,
                attempt=event.attempt,
            )

    def _progressed(self, event: PromptEncoded | StepFinished | DenoisingFinished | DecodingFinished) -> list[Decision]:
        job = self.state.jobs.get(event.job_id)
        if job is None:
            return []
        match event:
            case PromptEncoded(attempt=attempt) if job.phase is Phase.ENCODING and attempt == job.attempt:
                job.phase = Phase.ENCODED
                # The embeddings stay at the encoder until a DiT worker has fetched them, so it is still needed.
            case StepFinished(epoch=epoch, step=step) if job.phase is Phase.DENOISING and epoch == job.epoch:
                job.step = step
                job.encoder = None
            case DenoisingFinished(epoch=epoch) if job.phase is Phase.DENOISING and epoch == job.epoch:
                job.phase = Phase.DENOISED
                job.step = job.steps
                job.encoder = None
                job.members = job.members[:1]
                self.state.hold(job, job.slots[:1])
            case DecodingFinished(epoch=epoch) if job.phase is Phase.DECODING and epoch == job.epoch:
                self._remove(job)
                return [CompleteJob(job.job_id, "decoded")]
        return []

    def _retry(self, job: Job, reason: str) -> list[Decision]:
        if job.attempt >= MAX_ATTEMPTS:
            return self._give_up(job, f"{reason}, and that was attempt {job.attempt} of {MAX_ATTEMPTS}")
        decisions = self._release(job, reason)
        job.phase = Phase.WAITING
        job.step = 0
        return [*decisions, RequeueJob(job.job_id, reason)]

    def _give_up(self, job: Job, reason: str) -> list[Decision]:
        return [*self._stop(job, reason), FailJob(job.job_id, reason)]

    def _stop(self, job: Job, reason: str) -> list[Decision]:
        decisions = self._release(job, reason)
        self._remove(job)
        return decisions

    def _release(self, job: Job, reason: str) -> list[Decision]:
        """Take everything from the job that it holds."""
        decisions: list[Decision] = []
        if job.members:
            decisions.append(RevokeLease(job.job_id, job.epoch, job.members, reason))
        if job.decoder is not None:
            decisions.append(CancelDecoding(job.job_id, job.epoch, job.decoder, reason))
        self.state.hold(job, ())
        job.encoder = job.decoder = None
        job.members = ()
        return decisions

    def _remove(self, job: Job) -> None:
        self.state.hold(job, ())
        del self.state.jobs[job.job_id]

    def _take_epoch(self) -> int:
        epoch = self._next_epoch
        self._next_epoch += 1
        return epoch
