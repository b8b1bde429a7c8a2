"""Settings every service shares, read once from the environment at start-up. A bad value stops the start."""

import socket
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.messages.cluster import Service

S = TypeVar("S", bound=BaseSettings)


class SettingsError(ValueError):
    """The environment holds a value that cannot be used; the message names it and says what fits."""


class ServiceSettings(BaseSettings):
    """What any process of the stack needs to know. Environment variables carry the prefix ``TRIPTYCH_``."""

    model_config = SettingsConfigDict(env_prefix="TRIPTYCH_", frozen=True, extra="ignore")

    nats_url: str = "nats://127.0.0.1:4222"
    instance: str = ""
    slot: int | None = Field(default=None, ge=0)
    log_level: str = "info"
    heartbeat_s: float = Field(default=0.5, gt=0)
    member_timeout_s: float = Field(default=3.0, gt=0)

    def instance_of(self, service: Service) -> str:
        """The lasting name of this process, such as ``dit-0``.

        Where none is set, the host name stands in: container replicas have one each.
        """
        return self.instance or f"{service}-{socket.gethostname()}"


class ComputeSettings(ServiceSettings):
    """What the processes that run a model need beside.

    ``precision``: of the model's weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU. What travels between
    the phases is float32 either way.

    ``drain_s``: how long work under way may go on after the process was asked to stop.
    """

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(default=1, ge=1)
    drain_s: float = Field(default=10.0, ge=0)


class WorkerSettings(ComputeSettings):
    """Those of the processes that run a part of the video model."""

    video_model: str = "demo"


def load_settings(kind: type[S]) -> S:
    """Read the settings from the environment.

    Raises:
        SettingsError: a variable holds something else than it should.
    """
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError("; ".join(_problems(error))) from error


def _problems(error: ValidationError) -> list[str]:
    """One for each variable: of a union every member complains apart."""
    found: dict[str, list[str]] = {}
    given: dict[str, object] = {}
    for item in error.errors():
        name = f"TRIPTYCH_{str(item['loc'][0]).upper() if item['loc'] else '?'}"
        found.setdefault(name, []).append(item["msg"])
        given[name] = item["input"]
    return [
        f"{name}: {' or '.join([first, *(other.removeprefix('Input should be ') for other in others)])}"
        f" (got {given[name]!r})"
        for name, (first, *others) in found.items()
    ]
