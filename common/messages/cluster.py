"""Who is in the cluster: members, their life signs, and what they can serve."""

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from common.messages.base import Message


class Service(StrEnum):
    """The processes of the house, one folder each (``gateway`` and ``services/*``)."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    ENCODER = "encoder"
    DIT = "dit"
    VAE = "vae"
    CACHE_STORE = "cache_store"
    PREFILL = "prefill"
    DECODE = "decode"


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


class LanguageModelInfo(Message):
    """What a language model can do, as its workers say. ``context_tokens`` bounds prompt and answer together.

    ``kv_tokens``: of how many tokens the worker has room for keys and values.
    """

    name: str
    context_tokens: int = Field(ge=1)
    kv_tokens: int = Field(default=0, ge=0)
    created_at_s: int = 0


class LanguageRole(StrEnum):
    """What an instance does for chats. The role is state, not code: an instance can have either, or both (fused)."""

    PREFILL = "prefill"
    DECODE = "decode"


class Member(Message):
    """One process of the stack, as it stands in the membership bucket under its ``instance``.

    ``instance`` is its lasting name (``dit-0``); ``incarnation`` differs in every life of it, so a restart is seen
    at once. ``slot`` is the GPU it works on, where it works on one; slots of one ``host`` can share a video.
    ``meeting`` is the address at which groups meet that it leads, where it can be in one. ``roles`` are a language
    worker's.
    """

    version: ClassVar[int] = 4

    instance: str
    incarnation: str
    service: Service
    state: MemberState
    host: str
    pid: int
    started_at_s: float
    slot: int | None = None
    device: str = "cpu"
    meeting: str = ""
    video_model: VideoModelInfo | None = None
    language_model: LanguageModelInfo | None = None
    roles: tuple[LanguageRole, ...] = ()


class FlipRole(Message):
    """To a language instance: take these ``roles`` from now on (TetriInfer, section 3.5).

    It loads nothing and drains by handing over: what it decodes and is not to decode any more goes to ``decode``, the
    first of which is the best, as far as they take it; prompts that wait and that it is not to compute any more are
    given back to be routed anew. What is left goes on here to its end. Answered when the roles are announced.
    """

    roles: tuple[LanguageRole, ...]
    decode: tuple[str, ...] = ()


class RoleFlipped(Message):
    """An instance has other ``roles`` than before. It took ``flip_s``, from when it was told until it had said so."""

    instance: str
    roles: tuple[LanguageRole, ...]
    flip_s: float


class Ping(Message):
    """Are you there? Asked of a member that others could not go on with; a dead one is nobody to the broker at once."""


class Heartbeat(Message):
    """Life sign of one member, published twice a second."""

    instance: str
    incarnation: str


class SchedulerLife(Message):
    """How many schedulers there have been. Each new one adds itself, and numbers its leases above all before."""

    number: int
