"""Who is in the cluster: members, their life signs, and what they can serve."""

from enum import StrEnum

from common.messages.base import Message


class Service(StrEnum):
    """The processes of the house, one folder each (``gateway`` and ``services/*``)."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    ENCODER = "encoder"
    DIT = "dit"
    VAE = "vae"
    CACHE_STORE = "cache_store"


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class VideoModelInfo(Message):
    """What a video model can do, as its workers announce it; the gateway validates requests against this.

    ``sizes`` are (width, height) in pixels. ``default_*`` apply where a request is silent.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    fps: tuple[int, int]
    steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    max_prompt_tokens: int
    default_size: tuple[int, int]
    default_frames: int
    default_fps: int
    default_steps: int
    default_guidance_scale: float
    created_at_s: int = 0


class Member(Message):
    """One process of the stack, as it stands in the membership bucket under its ``instance``.

    ``instance`` is its lasting name (``dit-0``); ``incarnation`` differs in every life of it, so a restart is seen
    at once. ``slot`` is the GPU it works on, where it works on one.
    """

    instance: str
    incarnation: str
    service: Service
    state: MemberState
    host: str
    pid: int
    started_at_s: float
    slot: int | None = None
    device: str = "cpu"
    video_model: VideoModelInfo | None = None


class Heartbeat(Message):
    """Life sign of one member, published twice a second."""

    instance: str
    incarnation: str


class SchedulerLife(Message):
    """How many schedulers there have been. Each new one adds itself, and numbers its leases above all before."""

    number: int
