"""What happens, as the scheduler's policies see it. Past tense, immutable, in the order it happened."""

from dataclasses import dataclass

from common.messages.cluster import Service


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is ready. DiT and VAE workers stand on a slot (one GPU); encoders have none.

    ``server`` names the machine whose GPUs are linked well enough to share a video; groups never span two of them.
    """

    instance: str
    service: Service
    slot: int | None = None
    server: str = ""


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker finishes what it has and takes nothing new."""

    instance: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died, restarted or withdrew: whatever it held is gone."""

    instance: str


@dataclass(frozen=True, slots=True)
class JobArrived:
    """A video waits to be made. Sizes in pixels; ``attempt`` counts the attempts made before (0 for a new job).

    A higher ``priority`` goes first. ``deadline_s`` is a moment on the clock of ``arrival_s``, None where there is
    none. ``step`` counts the steps already done and kept as a checkpoint in the cache store.
    """

    job_id: str
    arrival_s: float
    width: int
    height: int
    frames: int
    steps: int
    attempt: int = 0
    priority: int = 0
    deadline_s: float | None = None
    step: int = 0


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    """The text embeddings are ready for ``attempt``."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A denoising step is done; ``step`` counts from 1.

    ``epoch`` is the lease the step ran under, ``next_epoch`` the one the next step will run under (None: the same), as
    the leader decided at the boundary. When that is the newest lease, slots that are not in it are free.
    """

    job_id: str
    epoch: int
    step: int
    next_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class JobParked:
    """The latent after ``step`` lies in the cache store, and all members of the lease are free."""

    job_id: str
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointStored:
    """The latent after ``step`` lies in the cache store, and the job goes on; a lost worker costs the steps since."""

    job_id: str
    step: int


@dataclass(frozen=True, slots=True)
class DenoisingFinished:
    """The latent is final and waits at the leader (the master GPU)."""

    job_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class DecodingFinished:
    """The file is stored."""

    job_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A phase of ``attempt`` could not be done."""

    job_id: str
    attempt: int
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """Somebody cancelled or deleted the job."""

    job_id: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The scheduler is to end: what runs goes on to its end, and nothing new is started any more."""


Event = (
    WorkerJoined
    | WorkerDraining
    | WorkerLost
    | JobArrived
    | PromptEncoded
    | StepFinished
    | JobParked
    | CheckpointStored
    | DenoisingFinished
    | DecodingFinished
    | AttemptFailed
    | JobCancelled
    | DrainRequested
)
