"""Everything the HTTP interface takes and gives, as pydantic models; ``/openapi.json`` is generated from them.

Video, list and deletion follow OpenAI's videos API, so that its SDKs read them unchanged; what we add is optional to
them. Fields without a unit suffix that hold a time are Unix seconds, as in OpenAI's own.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from common.messages.cluster import LanguageRole, MemberState, Service
from common.messages.video import VideoState

# The largest integer that every reader of JSON keeps exactly.
MAX_SEED = 2**53 - 1
# What a request may ask for, and what it gets that does not ask.
PRIORITIES = (-100, 100)
DEFAULT_PRIORITY = 0


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ErrorObject(Schema):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Schema):
    """Every answer from 400 upwards."""

    error: ErrorObject


# --- videos ------------------------------------------------------------------------------------------------------


class CreateVideo(Schema):
    """What to make. What is left out is taken from the model's defaults; the answer reports every value used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    prompt: str = Field(description="What the video shows.")
    expand_prompt: bool | None = Field(
        default=None,
        description="Have the stack's language model turn a terse or odd idea into a caption for the video model.",
    )
    model: str | None = Field(default=None, description="A model of /v1/models; without it, the only one there is.")
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in pixels, such as 256x256.", examples=["256x256"])
    seconds: str | int | float | None = Field(
        default=None, description="Duration. Together with fps it determines the frames."
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Same request, same seed: same video. Without it, a random one."
    )
    steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="How strongly the prompt guides the video."
    )
    negative_prompt: str | None = Field(default=None, description="What the video should not show.")
    frames: int | None = Field(default=None, description="Number of frames; instead of seconds.")
    fps: int | None = Field(default=None, description="Frames per second.")
    priority: int | None = Field(
        default=None,
        description=f"From {PRIORITIES[0]} to {PRIORITIES[1]}; of what waits, the higher goes first. Without it, "
        f"{DEFAULT_PRIORITY}.",
        json_schema_extra={"minimum": PRIORITIES[0], "maximum": PRIORITIES[1]},
    )
    deadline: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Seconds from now by which the video should be done, above 0. A wish for policies that go by "
        "deadlines: a late video is made all the same.",
        json_schema_extra={"exclusiveMinimum": 0},
    )


class VideoError(Schema):
    code: str
    message: str
    param: str | None = None


Status = Literal["queued", "in_progress", "completed", "failed"]


class Video(Schema):
    """A video job. ``status`` is OpenAI's; ``state`` is finer. A cancelled one has status ``failed``, error code
    ``cancelled``."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    status: Status
    progress: int = Field(ge=0, le=100, description="Per cent.")
    model: str
    prompt: str = Field(description="As it was given.")
    expanded_prompt: str | None = Field(
        default=None, description="What the video model was given in its place, if the prompt was expanded."
    )
    size: str
    seconds: str
    error: VideoError | None = None
    remixed_from_video_id: str | None = None

    state: VideoState
    seed: int
    frames: int
    fps: int
    steps: int
    guidance_scale: float
    negative_prompt: str = ""
    priority: int = Field(default=DEFAULT_PRIORITY, description="As asked for; of what waits, the higher goes first.")
    deadline_at: float | None = Field(default=None, description="By when it should be done, if that was asked for.")
    queue_place: int | None = Field(default=None, description="1 is the next to start; absent once it runs.")
    step: int = Field(description="Denoising steps done.")
    degree_of_parallelism: int = Field(description="GPUs on it at the moment.")
    estimate_s: float | None = Field(default=None, description="Seconds left, estimated.")
    attempt: int = Field(description="How often it was started; 1 if nothing went wrong.")


class VideoList(Schema):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(Schema):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class VideoEvent(Schema):
    """One server-sent event's ``data``: where the video stands now."""

    id: str
    object: Literal["video.event"] = "video.event"
    status: Status
    state: VideoState
    progress: int
    queue_place: int | None
    step: int
    steps: int
    degree_of_parallelism: int
    estimate_s: float | None
    error: VideoError | None


class Span(Schema):
    """One piece of work on one slot. ``phase`` is ``encode``, ``step`` or ``decode``. A step that several slots did
    together has one span for each, with ``degree_of_parallelism`` of them."""

    instance: str
    slot: int | None
    phase: str
    step: int | None
    degree_of_parallelism: int
    started_at_s: float
    ended_at_s: float


class Timeline(Schema):
    """Which slot did which step."""

    id: str
    object: Literal["video.timeline"] = "video.timeline"
    spans: list[Span]


# --- models ------------------------------------------------------------------------------------------------------


class VideoLimits(Schema):
    """What a video model can do. Pairs under ``fps``, ``steps`` and ``guidance_scale`` are the least and the most."""

    sizes: list[str]
    frames: list[int]
    fps: tuple[int, int]
    steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    max_prompt_tokens: int
    default_size: str
    default_frames: int
    default_fps: int
    default_steps: int
    default_guidance_scale: float


class LanguageLimits(Schema):
    """What a language model can do: ``context_tokens`` bounds prompt and answer together."""

    context_tokens: int


class Model(Schema):
    """A model, with the limits of its ``kind``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "triptych"
    kind: Literal["video", "language"]
    video: VideoLimits | None = None
    language: LanguageLimits | None = None


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: list[Model]


# --- the stack ---------------------------------------------------------------------------------------------------


class ClusterMember(Schema):
    instance: str
    service: Service
    state: MemberState
    host: str
    slot: int | None
    device: str
    model: str | None
    started_at_s: float
    roles: list[LanguageRole]


class ClusterSlot(Schema):
    """A slot is one GPU: a DiT and a VAE worker share it."""

    slot: int
    host: str
    device: str
    members: list[str]


class Cluster(Schema):
    """``queue_depth``: jobs the broker holds that no scheduler has taken; ``videos``: how many are in each state."""

    object: Literal["cluster"] = "cluster"
    ready: bool
    missing: list[str]
    members: list[ClusterMember]
    slots: list[ClusterSlot]
    queue_depth: int
    videos: dict[VideoState, int]


class Health(Schema):
    status: Literal["alive"] = "alive"


class Readiness(Schema):
    """``missing`` names what the stack still waits for."""

    status: Literal["ready", "not_ready"]
    missing: list[str]
    error: ErrorObject | None = None
