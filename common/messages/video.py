"""A video job: its record and states, and the conversation between scheduler, encoder, DiT and VAE."""

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field

from common.messages.base import Message
from common.messages.failures import Failure
from common.messages.tensors import TensorRef


class VideoState(StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({VideoState.COMPLETED, VideoState.FAILED, VideoState.CANCELLED})

# From each state, where a job may go. A phase lost with its worker sends the job back to the queue.
_MOVES = {
    VideoState.QUEUED: {VideoState.ENCODING, VideoState.FAILED, VideoState.CANCELLED},
    VideoState.ENCODING: {VideoState.DENOISING, VideoState.QUEUED, VideoState.FAILED, VideoState.CANCELLED},
    VideoState.DENOISING: {VideoState.DECODING, VideoState.QUEUED, VideoState.FAILED, VideoState.CANCELLED},
    VideoState.DECODING: {VideoState.COMPLETED, VideoState.QUEUED, VideoState.FAILED, VideoState.CANCELLED},
    VideoState.COMPLETED: set[VideoState](),
    VideoState.FAILED: set[VideoState](),
    VideoState.CANCELLED: set[VideoState](),
}


class IllegalMove(ValueError):
    """A state change that the job's life does not have."""


class VideoRequest(Message):
    """What is to be made, fully resolved: every default filled in, every value checked by the gateway.

    Sizes in pixels, ``fps`` in frames per second. ``seed`` fixes the video: same request, same bytes. A higher
    ``priority`` goes first; ``deadline_s`` is by when it should be done, in Unix seconds. Neither changes the video.
    ``prompt`` is as the client gave it, ``expanded_prompt`` the caption that a language model made of it, if one did.
    """

    model: str
    prompt: str
    expanded_prompt: str | None = None
    negative_prompt: str = ""
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance_scale: float
    seed: int
    priority: int = 0
    deadline_s: float | None = None

    @property
    def caption(self) -> str:
        """What the video model is to read."""
        return self.prompt if self.expanded_prompt is None else self.expanded_prompt


class VideoFile(Message):
    """The finished file in the object store."""

    object_name: str
    size_bytes: int
    sha256: str


class VideoRecord(Message):
    """The truth about one job, in the record bucket under its id. Every change is a compare-and-set.

    ``attempt`` counts how often the job was started (1 for an undisturbed one). Times are Unix seconds.
    """

    job_id: str
    state: VideoState
    request: VideoRequest
    created_at_s: float
    updated_at_s: float
    started_at_s: float | None = None
    ended_at_s: float | None = None
    attempt: int = 0
    file: VideoFile | None = None
    failure: Failure | None = None

    def moved(
        self,
        state: VideoState,
        now_s: float,
        *,
        file: VideoFile | None = None,
        failure: Failure | None = None,
    ) -> Self:
        """The record after a move to ``state``.

        Raises:
            IllegalMove: a job in this state cannot go there (a terminal state is never left).
        """
        if state not in _MOVES[self.state]:
            raise IllegalMove(f"video {self.job_id} cannot go from {self.state} to {state}")
        changes: dict[str, object] = {"state": state, "updated_at_s": now_s}
        if state is VideoState.ENCODING:
            changes["attempt"] = self.attempt + 1
            changes["started_at_s"] = self.started_at_s or now_s
        if state.terminal:
            changes |= {"ended_at_s": now_s, "file": file, "failure": failure}
        return self.model_copy(update=changes)


class VideoQueued(Message):
    """In the work queue: a job whose record is stored and that nobody has taken yet."""

    job_id: str


# --- scheduler and encoder ---------------------------------------------------------------------------------------


class EncodePrompt(Message):
    """Encode a job's prompt, and its negative prompt where it has one."""

    job_id: str
    prompt: str
    negative_prompt: str = ""


class PromptEncoded(Message):
    """The text embeddings, each [tokens, channels] without padding, kept by the encoder until released.

    ``negative`` is absent where the request has no negative prompt: the DiT's own null embedding stands in.
    """

    job_id: str
    text: TensorRef
    negative: TensorRef | None = None
    started_at_s: float
    ended_at_s: float


class PromptSource(StrEnum):
    """Where a prompt's embeddings came from: they were known, others had made them, or they were made."""

    MEMORY = "memory"
    CACHE_STORE = "cache_store"
    MODEL = "model"


class PromptsServed(Message):
    """So many prompts' embeddings came from ``source``; for whoever counts."""

    source: PromptSource
    prompts: int


# --- scheduler and DiT -------------------------------------------------------------------------------------------


class Checkpoint(Message):
    """A job's latent [1, channels, frames, height, width] after ``step`` steps, kept by the cache store.

    That is all there is to keep: the sampler's state is a function of the request. Its noise is drawn once, from the
    seed, before the first step, and its schedule follows from the count of steps, the size and the frames.
    """

    step: int
    latent: TensorRef


def checkpoint_key(job_id: str) -> str:
    """Under what key the cache store keeps a job's checkpoint. Its version is the step."""
    return f"video/{job_id}/latent"


class Lease(Message):
    """The right of ``members`` to denoise one job together, until revoked, changed or done (DDiT's grant).

    ``epoch`` grows with every lease that any scheduler grants; a worker refuses any older than it has seen.
    ``members`` are DiT instances in rank order, each on the slot at its place in ``slots``; ``leader``, the first, is
    the one that reports and keeps the latent. Where there are several, their group meets at ``meeting``, the leader's
    own place. ``from_step`` is the number of steps done already, as far as the scheduler knows.

    With ``text`` the job starts: the leader fetches the embeddings and goes on from ``resume``, or begins where there
    is none or it cannot be fetched. Without ``text`` the job runs already: its members have the latent, this lease
    takes the place of theirs at the next step boundary, and newcomers get everything from the leader. The leader is
    told last, once every other member has answered that it is free to come: so no step waits for one that is not.
    """

    version: ClassVar[int] = 2

    job_id: str
    epoch: int
    members: tuple[str, ...]
    leader: str
    request: VideoRequest
    slots: tuple[int, ...] = ()
    meeting: str = ""
    from_step: int = 0
    text: TensorRef | None = None
    negative: TensorRef | None = None
    resume: Checkpoint | None = None


class RevokeLease(Message):
    """Stop working on ``job_id`` at the next step boundary and drop what is held for its leases up to ``epoch``.

    Without a ``job_id``: whatever was granted up to ``epoch`` (a new scheduler clears what its predecessor left). A
    group stops together: its leader tells the others, who never leave it on their own.
    """

    job_id: str | None
    epoch: int


class LeasesRevoked(Message):
    """Which job the worker has at hand, if any: it works on it, or has let it go and keeps its latent for a while."""

    job_id: str | None = None


class FindLatent(Message):
    """What latent of the job, taken from this worker before, is kept; answered once the step under way is done.

    With ``uses`` it is exported for so many fetches.
    """

    job_id: str
    uses: int = Field(default=0, ge=0)


class LatentFound(Message):
    """The latent after ``step`` steps is kept, and exported if that was asked for; 0: nothing of use is kept."""

    step: int = 0
    latent: TensorRef | None = None


class ParkJob(Message):
    """Bring the latent after the step under way to the cache store, free the group, and report ``JobParked``.

    For the leader of the job's leases up to ``epoch``. A job whose last step is under way is finished instead.
    """

    job_id: str
    epoch: int


class GroupCalled(Message):
    """From a leader to one that joins: the group of lease ``epoch`` meets now."""

    job_id: str
    epoch: int


class StepFinished(Message):
    """One denoising step is done. ``step`` counts from 1 to ``steps``. Times are Unix seconds.

    ``epoch`` is the lease it ran under, on exactly the ``slots``; ``next_epoch`` the one under which the next step
    runs, where that is another one. Slots that only the former has are free by now.
    """

    version: ClassVar[int] = 2

    job_id: str
    epoch: int
    instance: str
    slots: tuple[int, ...]
    step: int
    steps: int
    started_at_s: float
    ended_at_s: float
    next_epoch: int | None = None

    @property
    def degree_of_parallelism(self) -> int:
        return len(self.slots)


class GroupLost(Message):
    """The group of lease ``epoch`` fell apart: a member died, hung or failed. Each survivor says so once.

    The latent after the last whole step is kept by each for a few seconds: a lease for some of them goes on from it.
    """

    job_id: str
    epoch: int
    instance: str
    members: tuple[str, ...]
    reason: str


class JobParked(Message):
    """The latent after ``step`` steps lies in the cache store, and every member of the lease is free."""

    job_id: str
    epoch: int
    instance: str
    step: int


class CheckpointStored(Message):
    """The latent after ``step`` steps lies in the cache store: losing the worker costs the steps since, no more.

    ``copies``: in how many cache stores it lies; with two, neither's loss matters.
    """

    job_id: str
    epoch: int
    step: int
    copies: int = 1


class DenoisingFinished(Message):
    """The latent [1, channels, frames, height, width] is final and waits at the lease's leader."""

    job_id: str
    epoch: int
    instance: str
    latent: TensorRef


# --- scheduler and VAE -------------------------------------------------------------------------------------------


class DecodeVideo(Message):
    """Decode the latent chunk by chunk and store the MP4 under ``object_name``."""

    job_id: str
    epoch: int
    request: VideoRequest
    latent: TensorRef
    object_name: str


class CancelDecoding(Message):
    """Stop decoding ``job_id`` (without one: anything) before its next chunk, for epochs up to ``epoch``."""

    job_id: str | None
    epoch: int


class DecodingFinished(Message):
    """The MP4 is in the object store. Times are Unix seconds."""

    job_id: str
    epoch: int
    instance: str
    slot: int
    file: VideoFile
    started_at_s: float
    ended_at_s: float


class PhaseFailed(Message):
    """A DiT or VAE worker could not do what it was asked."""

    job_id: str
    epoch: int
    instance: str
    failure: Failure


# --- scheduler and gateway ---------------------------------------------------------------------------------------


class VideoProgress(Message):
    """Where a job stands, for the people waiting: published at every change and at every step.

    ``queue_place`` is 1 for the next to start, absent once it runs. ``remaining_s`` is an estimate in seconds,
    absent while there is nothing to base one on.
    """

    job_id: str
    state: VideoState
    queue_place: int | None = None
    step: int = 0
    steps: int
    degree_of_parallelism: int = 0
    remaining_s: float | None = None


class TimelineSpan(Message):
    """One piece of work on one slot. ``phase`` is ``encode``, ``step`` or ``decode``; times are Unix seconds."""

    instance: str
    slot: int | None
    phase: str
    step: int | None
    degree_of_parallelism: int
    started_at_s: float
    ended_at_s: float


class VideoTimeline(Message):
    """Which slot did which step of a job, kept beside its record once it has ended."""

    job_id: str
    spans: tuple[TimelineSpan, ...]
