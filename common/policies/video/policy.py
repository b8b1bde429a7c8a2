"""The policy interface of the video scheduler, and the life of a job that every policy shares.

A policy is pure: events go in with the time they happened, decisions with a reason come out. The live scheduler
and the simulator drive the same classes. What differs between policies is ``schedule`` (who gets which slots), for some
``rank`` (who comes first) and ``lane`` (who waits for the same GPUs), and whether a video keeps its whole group for the
decoding (``decoupled``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from common.policies.video.decisions import (
    CancelDecoding,
    CompleteJob,
    Decision,
    FailJob,
    GrantLease,
    ParkJob,
    RequeueJob,
    RevokeLease,
    StartDecoding,
    StartEncoding,
)
from common.policies.video.events import (
    AttemptFailed,
    CheckpointStored,
    DecodingFinished,
    DenoisingFinished,
    DrainRequested,
    Event,
    JobArrived,
    JobCancelled,
    JobParked,
    PromptEncoded,
    StepFinished,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
)
from common.policies.video.job_queue import JobQueue, Rank
from common.policies.video.placement import Placement, power_of_two_within
from common.policies.video.rib import Rib, VideoKind, paper_rib
from common.policies.video.state import ClusterState, Job, Phase, Slot

MAX_ATTEMPTS = 5

# Looking a member of an enumeration up costs more than a name.
_READY = frozenset((Phase.ENCODED, Phase.PARKED))
_WAITING, _ENCODING, _ENCODED, _PARKED = Phase.WAITING, Phase.ENCODING, Phase.ENCODED, Phase.PARKED
_DENOISING, _DENOISED, _DECODING = Phase.DENOISING, Phase.DENOISED, Phase.DECODING


class Lane:
    """Videos that wait for the same GPUs: those without embeddings, and those that could start denoising now."""

    def __init__(self) -> None:
        self.to_encode = JobQueue()
        self.ready = JobQueue()
        self.encoding = 0
        self.encoded = 0


class Policy(ABC):
    """Base of the scheduling policies.

    Args:
        first_epoch: the epoch of the first lease; each later one is higher. A scheduler passes a number above
            anything its predecessors used, so that workers refuse leases from before it.
        rib: the profile that decisions go by; None: the paper's table.
        placement: keeps the free slots.
    """

    name: str
    # Whether all GPUs but the master are free while it decodes (DDiT's inter-phase decoupling).
    decoupled: ClassVar[bool] = True
    # Whether a prompt is also encoded out of turn, if its video would be the next to start.
    encodes_next: ClassVar[bool] = False

    def __init__(self, first_epoch: int = 1, rib: Rib | None = None, placement: Placement | None = None) -> None:
        self.state = ClusterState(placement or Placement())
        self.rib = rib or paper_rib()
        self.draining = False
        self.lanes: dict[object, Lane] = {None: Lane()}
        self._next_epoch = first_epoch
        self._to_encode = 0
        # By kind, until a server grows.
        self._best_degrees: dict[VideoKind, int] = {}
        # Each takes an event and returns what follows from it at once, or None: then nothing else needs a look.
        self._handlers: dict[type[Any], Callable[[Any, float], list[Decision] | None]] = {
            WorkerJoined: self._worker_joined,
            WorkerDraining: self._worker_draining,
            WorkerLost: self._worker_lost,
            JobArrived: self._arrived,
            PromptEncoded: self._prompt_encoded,
            StepFinished: self._step_finished,
            JobParked: self._parked,
            CheckpointStored: self._checkpoint_stored,
            DenoisingFinished: self._denoising_finished,
            DecodingFinished: self._decoding_finished,
            AttemptFailed: self._attempt_failed,
            JobCancelled: self._cancelled,
            DrainRequested: self._drain_requested,
        }

    # --- what policies decide differently -------------------------------------------------------------------------

    @abstractmethod
    def schedule(self, now_s: float) -> list[Decision]:
        """Put waiting jobs on free slots. Called after every event but a step's end that frees none."""

    def rank(self, job: Job) -> float:
        """Who comes first among videos of the same priority: the lowest. Must not change while the job waits."""
        return job.arrival_s

    def lane(self, job: Job) -> Lane:
        """With whom the job waits for the same GPUs."""
        return self.lanes[None]

    def watched(self) -> Iterable[str]:
        """The jobs whose last finished step the policy wants to know before anything else happens.

        A simulator may leave out the other jobs' step reports, unless a changed lease takes effect with them.
        """
        return ()

    # --- events in, decisions out ---------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Decision]:
        """Take in one event; returns what to do, in order. Events of an overtaken attempt or epoch change nothing."""
        decisions = self._handlers[type(event)](event, now_s)
        if decisions is None:
            return []
        if self.state.by_phase[_DENOISED]:
            decisions += self.decode()
        if not self.draining:
            decisions += self.schedule(now_s)
            if self._to_encode:
                decisions += self._encode()
        return decisions

    def decode(self) -> list[Decision]:
        """Send finished latents to VAE workers: on the master's slot, all others being free again (DDiT).

        A master whose slot has no VAE worker goes on to other videos; its latent waits for a slot that has one. Where
        phases are not decoupled, the rest of the group stays held.
        """
        decisions: list[Decision] = []
        for job in self.state.in_phase(_DENOISED):
            own = [self.state.slots[number] for number in job.slots if self.state.slots[number].vae]
            if not own:
                self._hold(job, ())
            slot = next(iter(own or self.state.free_for_decoding()), None)
            if slot is not None:
                decisions.append(self.start_decoding(job, slot, f"denoised; slot {slot.number} has a VAE worker"))
        return decisions

    def queue_places(self) -> dict[str, int]:
        """The jobs that have no GPU yet, by id: 1 for the one that starts denoising next. Sorts all of them."""
        order = [job for lane in self.lanes.values() for job in lane.ready]
        order += sorted(self.state.by_phase[_ENCODING].values(), key=self._queue_rank)
        order += [job for lane in self.lanes.values() for job in lane.to_encode]
        return {job.job_id: place for place, job in enumerate(order, 1)}

    def best_degree(self, job: Job) -> int:
        """B of the job's kind (DDiT's optimal degree), or as much of it as a server has slots for, at least 1."""
        best = self._best_degrees.get(job.kind)
        if best is None:
            most = max(1, power_of_two_within(self.state.placement.largest_server))
            best = self._best_degrees[job.kind] = min(self.rib.optimal_degree(job.kind), most)
        return best

    # --- the steps of a job's life, for ``schedule`` to choose from -----------------------------------------------

    def start_encoding(self, job: Job, encoder: str, reason: str) -> StartEncoding:
        self._move(job, _ENCODING)
        job.attempt += 1
        job.encoder = encoder
        self.state.encoders[encoder] += 1
        return StartEncoding(job.job_id, job.attempt, encoder, reason)

    def grant_lease(self, job: Job, slots: tuple[int, ...], now_s: float, reason: str) -> GrantLease:
        """Start denoising, from the job's step, on these slots of one server.

        Raises:
            ValueError: a slot has no DiT worker or is held by another job.
        """
        members = self._members(slots)
        self._hold(job, slots)
        self._move(job, _DENOISING)
        job.members = members
        job.lease = job.active = slots
        job.epoch = job.first_epoch = job.settled_epoch = self._take_epoch()
        job.last_step = job.from_step = job.step
        job.step_at_s = now_s
        return GrantLease(job.job_id, job.epoch, members, slots, reason, job.step)

    def change_lease(self, job: Job, slots: tuple[int, ...], reason: str) -> GrantLease:
        """Have a running job go on with other members from its next step boundary; the master stays.

        Raises:
            ValueError: the job does not run, is about to be parked, would lose its master, or a slot is not to be had.
        """
        if job.phase is not _DENOISING or job.parking or slots[0] != job.slots[0]:
            raise ValueError(f"{job.job_id} ({job.phase}) cannot change from {job.slots} to {slots}")
        members = self._members(slots, job)
        leaving = tuple([number for number in job.slots if number not in slots])
        self._hold(job, slots + leaving)
        job.leaving = tuple([name for name in job.members + job.leaving if name not in members])
        job.members = members
        job.lease = slots
        job.epoch = self._take_epoch()
        return GrantLease(job.job_id, job.epoch, members, slots, reason, job.step)

    def park_job(self, job: Job, reason: str) -> ParkJob:
        """Take all slots from a running job at its next step boundary; its latent is kept.

        Raises:
            ValueError: the job does not run or is being parked already.
        """
        if job.phase is not _DENOISING or job.parking:
            raise ValueError(f"{job.job_id} ({job.phase}) cannot be parked")
        job.parking = True
        return ParkJob(job.job_id, job.epoch, job.members + job.leaving, reason)

    def start_decoding(self, job: Job, slot: Slot, reason: str) -> StartDecoding:
        if slot.vae is None:
            raise ValueError(f"slot {slot.number} has no VAE worker")
        if self.decoupled or slot.number not in job.slots:
            self._hold(job, (slot.number,))
        self._move(job, _DECODING)
        job.decoder = slot.vae
        return StartDecoding(job.job_id, job.epoch, slot.vae, slot.number, reason)

    # --- the scheduler itself -------------------------------------------------------------------------------------

    def _drain_requested(self, event: DrainRequested, now_s: float) -> list[Decision] | None:
        self.draining = True
        return None

    # --- workers --------------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined, now_s: float) -> list[Decision] | None:
        self.state.worker_joined(event.instance, event.service, event.slot, event.server)
        self._best_degrees.clear()
        return []

    def _worker_draining(self, event: WorkerDraining, now_s: float) -> list[Decision] | None:
        self.state.worker_draining(event.instance)
        return []

    def _worker_lost(self, event: WorkerLost, now_s: float) -> list[Decision] | None:
        self.state.worker_draining(event.instance)
        reason = f"{event.instance} was lost"
        decisions: list[Decision] = []
        for job in self.state.jobs_on(event.instance):
            decisions += self._go_on_without(job, event.instance, now_s) or self._retry(job, reason)
        return decisions

    def _go_on_without(self, job: Job, lost: str, now_s: float) -> list[Decision]:
        """Those left of a group each have the whole latent of the last step: only the step under way is lost.

        The largest power of two of them goes on. It is led by the old master if that is one of them, else by one that
        has the latent already; they go on too if they were to be parked. Nothing if nobody has the latent.
        """
        if job.phase is not _DENOISING or job.step <= job.from_step:
            return []
        known = dict(zip(job.lease, job.members, strict=True))
        alive = [
            number for number in job.active if (known.get(number) or self.state.slots[number].dit) not in (None, lost)
        ]
        alive.sort(key=lambda number: number not in job.holders)
        size = power_of_two_within(len(alive))
        if not size or alive[0] not in job.holders:
            return []
        slots = tuple(alive[:size])
        leaving = tuple(alive[size:])
        if job.parking:
            self._unpark(job)
        self._hold(job, slots + leaving)
        job.leaving = self._members(leaving, job)
        job.members = self._members(slots, job)
        job.lease = job.active = slots
        job.holders = tuple(number for number in slots if number in job.holders)
        job.epoch = self._take_epoch()
        job.step_at_s = now_s
        reason = f"{lost} was lost; {size} of its group still have the latent after step {job.step}"
        return [GrantLease(job.job_id, job.epoch, job.members, slots, reason, job.step)]

    # --- jobs -----------------------------------------------------------------------------------------------------

    def _arrived(self, event: JobArrived, now_s: float) -> list[Decision] | None:
        if event.job_id in self.state.jobs:
            return []
        job = Job(
            event.job_id,
            event.arrival_s,
            event.width,
            event.height,
            event.frames,
            event.steps,
            attempt=event.attempt,
            step=event.step,
            priority=event.priority,
            deadline_s=event.deadline_s,
            checkpoint=event.step,
        )
        self.state.add(job)
        self._enter(job)
        return []

    def _prompt_encoded(self, event: PromptEncoded, now_s: float) -> list[Decision] | None:
        job = self.state.jobs.get(event.job_id)
        if job is not None and job.phase is _ENCODING and event.attempt == job.attempt:
            # The embeddings stay at the encoder until a DiT worker has fetched them, so it is still needed.
            self._move(job, _ENCODED)
        return []

    def _step_finished(self, event: StepFinished, now_s: float) -> list[Decision] | None:
        job = self._running(event.job_id, event.epoch)
        if job is None:
            return None
        if event.step > job.step:
            job.step = event.step
        job.step_at_s = now_s
        job.encoder = None
        if event.epoch == job.settled_epoch:
            job.holders = job.active
        if job.settled_epoch == job.epoch or (event.next_epoch or event.epoch) != job.epoch:
            return None
        frees = bool(job.leaving) or len(job.slots) > len(job.lease)
        self._settle(job)
        # Who joins has the latent once a step was done together, and who leaves drops it.
        here = job.active if event.epoch == job.epoch else job.holders
        job.holders = tuple([number for number in here if number in job.active])
        return [] if frees else None

    def _settle(self, job: Job) -> None:
        """The newest lease takes effect."""
        self._hold(job, job.lease)
        job.active = job.lease
        job.leaving = ()
        job.settled_epoch = job.epoch
        job.last_step = job.step

    def _unpark(self, job: Job) -> None:
        """It was to be parked, and goes on running instead."""
        job.parking = False

    def _parked(self, event: JobParked, now_s: float) -> list[Decision] | None:
        job = self._running(event.job_id, event.epoch)
        if job is None:
            return None
        # Its leader, or whoever was to go on without it, may have heard of a loss only after it had been parked.
        reason = "parked before it heard of the loss"
        decisions: list[Decision] = [] if job.parking else [RevokeLease(job.job_id, job.epoch, job.members, reason)]
        self._end_of_denoising(job)
        self._hold(job, ())
        job.members = ()
        job.step = job.checkpoint = event.step
        self._move(job, _PARKED)
        return decisions

    def _checkpoint_stored(self, event: CheckpointStored, now_s: float) -> list[Decision] | None:
        job = self.state.jobs.get(event.job_id)
        if job is not None:
            job.checkpoint = max(job.checkpoint, event.step)
        return None

    def _denoising_finished(self, event: DenoisingFinished, now_s: float) -> list[Decision] | None:
        job = self._running(event.job_id, event.epoch)
        if job is None:
            return []
        self._end_of_denoising(job)
        # Under which lease the latent lies at the master; a newer one came too late to take effect.
        job.epoch = event.epoch
        job.step = job.steps
        job.members = job.members[:1]
        self._hold(job, job.slots[:1] if self.decoupled else job.lease)
        self._move(job, _DENOISED)
        return []

    def _end_of_denoising(self, job: Job) -> None:
        job.encoder = None
        job.parking = False
        job.leaving = ()
        job.active = ()
        job.holders = ()

    def _decoding_finished(self, event: DecodingFinished, now_s: float) -> list[Decision] | None:
        job = self.state.jobs.get(event.job_id)
        if job is None or job.phase is not _DECODING or event.epoch != job.epoch:
            return []
        self._remove(job)
        return [CompleteJob(job.job_id, "decoded")]

    def _attempt_failed(self, event: AttemptFailed, now_s: float) -> list[Decision] | None:
        job = self.state.jobs.get(event.job_id)
        if job is None or job.attempt != event.attempt or job.phase is _WAITING:
            return []
        return self._retry(job, event.reason) if event.retryable else self._give_up(job, event.reason)

    def _cancelled(self, event: JobCancelled, now_s: float) -> list[Decision] | None:
        job = self.state.jobs.get(event.job_id)
        return self._stop(job, "cancelled") if job else []

    def _running(self, job_id: str, epoch: int) -> Job | None:
        """The job, if it is denoising and ``epoch`` is a lease of this run of it."""
        job = self.state.jobs.get(job_id)
        if job is None or job.phase is not _DENOISING or not job.first_epoch <= epoch <= job.epoch:
            return None
        return job

    def _retry(self, job: Job, reason: str) -> list[Decision]:
        if job.checkpoint > job.secured:
            # It gets on: only attempts that came to nothing count.
            job.secured, job.forgiven = job.checkpoint, job.attempt
        elif job.attempt - job.forgiven >= MAX_ATTEMPTS:
            return self._give_up(job, f"{reason}, after {MAX_ATTEMPTS} attempts without progress")
        decisions = self._release(job, reason)
        job.step = job.checkpoint
        self._move(job, _WAITING)
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
            decisions.append(RevokeLease(job.job_id, job.epoch, job.members + job.leaving, reason))
        if job.decoder is not None:
            decisions.append(CancelDecoding(job.job_id, job.epoch, job.decoder, reason))
        self._end_of_denoising(job)
        self._hold(job, ())
        job.decoder = None
        job.members = ()
        return decisions

    # --- the books ------------------------------------------------------------------------------------------------

    def _move(self, job: Job, phase: Phase) -> None:
        self._leave(job)
        self.state.move(job, phase)
        self._enter(job)

    def _remove(self, job: Job) -> None:
        self._hold(job, ())
        self._leave(job)
        self.state.remove(job)

    def _hold(self, job: Job, slots: tuple[int, ...]) -> None:
        self.state.hold(job, slots)

    def _enter(self, job: Job) -> None:
        """The job's phase begins: it joins the queue that goes with it."""
        phase = job.phase
        if phase is _WAITING:
            self._to_encode += 1
            self.lane(job).to_encode.push(job, self._queue_rank(job))
        elif phase is _ENCODING:
            self.lane(job).encoding += 1
        elif phase in _READY:
            lane = self.lane(job)
            lane.encoded += phase is _ENCODED
            lane.ready.push(job, self._queue_rank(job))

    def _leave(self, job: Job) -> None:
        """The job's phase ends."""
        phase = job.phase
        if phase is _WAITING:
            self._to_encode -= 1
            self.lane(job).to_encode.discard(job)
        elif phase is _ENCODING:
            self.lane(job).encoding -= 1
            if job.encoder in self.state.encoders:
                self.state.encoders[job.encoder] = max(0, self.state.encoders[job.encoder] - 1)
        elif phase in _READY:
            lane = self.lane(job)
            lane.encoded -= phase is _ENCODED
            lane.ready.discard(job)

    def _queue_rank(self, job: Job) -> Rank:
        return (-job.priority, self.rank(job))

    def _encode(self) -> list[Decision]:
        """Have prompts encoded a little ahead, one for each slot, so that no slot waits for an encoder."""
        encoders = self.state.encoders
        decisions: list[Decision] = []
        if not encoders:
            return decisions
        room = max(1, len(self.state.slots))
        for lane in self.lanes.values():
            while (job := lane.to_encode.first()) is not None and (
                lane.encoding + lane.encoded < room or (self.encodes_next and _is_next(lane))
            ):
                encoder = min(encoders, key=encoders.__getitem__)
                decisions.append(self.start_encoding(job, encoder, "next in the queue"))
        return decisions

    def _members(self, slots: tuple[int, ...], job: Job | None = None) -> tuple[str, ...]:
        """The workers on these slots; those that ``job`` has already may be draining."""
        every = self.state.slots
        known = dict(zip(job.lease, job.members, strict=True)) if job else {}
        members = []
        for number in slots:
            name = known.get(number) or every[number].dit
            if name is None:
                raise ValueError("a lease needs a DiT worker on every slot")
            members.append(name)
        return tuple(members)

    def _take_epoch(self) -> int:
        epoch = self._next_epoch
        self._next_epoch += 1
        return epoch


def _is_next(lane: Lane) -> bool:
    """Whether the first of those without embeddings would start before all that have them."""
    ready = lane.ready.first_rank()
    waiting = lane.to_encode.first_rank()
    return ready is None or (waiting is not None and waiting < ready)
