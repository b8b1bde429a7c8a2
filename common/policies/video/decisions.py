"""What a scheduler policy decides. Imperative, immutable, each with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StartEncoding:
    """Begin attempt number ``attempt`` of the job: have its prompt encoded."""

    job_id: str
    attempt: int
    encoder: str
    reason: str


@dataclass(frozen=True, slots=True)
class GrantLease:
    """Give ``members`` (DiT instances in rank order) to the job; the first is the leader and keeps the latent.

    A job that runs already gets more or fewer members under a higher epoch this way. That takes effect at its next step
    boundary: slots that join are held at once and idle until then, slots that leave are held until then. The leader
    of a running job changes only if it is lost. ``from_step`` is the number of steps done already: the latent of a
    parked or checkpointed job comes from the cache store.
    """

    job_id: str
    epoch: int
    members: tuple[str, ...]
    slots: tuple[int, ...]
    reason: str
    from_step: int = 0

    @property
    def leader(self) -> str:
        return self.members[0]


@dataclass(frozen=True, slots=True)
class ParkJob:
    """Put the job's latent into the cache store at the next step boundary and free ``members``.

    ``epoch`` is that of the job's newest lease. The slots stay held until ``JobParked`` or, if it ends before
    that, until ``DenoisingFinished``.
    """

    job_id: str
    epoch: int
    members: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Take the job from ``members`` at the next step boundary."""

    job_id: str
    epoch: int
    members: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StartDecoding:
    """Have the job's latent decoded by the VAE worker ``instance``."""

    job_id: str
    epoch: int
    instance: str
    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class CancelDecoding:
    """Stop the job's decoding at the next chunk."""

    job_id: str
    epoch: int
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class RequeueJob:
    """The attempt is lost; the job waits again in its old place."""

    job_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class CompleteJob:
    """Everything is done."""

    job_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class FailJob:
    """Give the job up."""

    job_id: str
    reason: str


Decision = (
    StartEncoding
    | GrantLease
    | ParkJob
    | RevokeLease
    | StartDecoding
    | CancelDecoding
    | RequeueJob
    | CompleteJob
    | FailJob
)
