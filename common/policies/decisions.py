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
    """Give ``members`` (DiT instances in rank order) to the job; the first is the leader and keeps the latent."""

    job_id: str
    epoch: int
    members: tuple[str, ...]
    slots: tuple[int, ...]
    reason: str

    @property
    def leader(self) -> str:
        return self.members[0]


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
    StartEncoding | GrantLease | RevokeLease | StartDecoding | CancelDecoding | RequeueJob | CompleteJob | FailJob
)
