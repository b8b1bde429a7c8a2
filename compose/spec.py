"""Reads the compose file: the part of the Compose specification that a plain process has a use for.

Keys that only a container needs (images, volumes, namespaces) are known and passed over; a key that is neither
acted on nor known to be a container's is refused, so that the file never says something that one of its two
runners silently ignores.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from compose.errors import ComposeError
from compose.interpolation import interpolate

COMPOSE_FILE = Path(__file__).with_name("compose.yaml")

_TOP_LEVEL = {"name", "services", "volumes"}
_FOR_CONTAINERS = {"image", "build", "init", "ipc", "pid", "shm_size", "ports", "volumes", "ulimits", "cap_add"}
_ACTED_ON = {"command", "environment", "depends_on", "deploy", "stop_grace_period", "healthcheck", "x-preload"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class RestartPolicy:
    """When what died is started again; ``deploy.restart_policy`` of the specification."""

    condition: str = "any"
    delay_s: float = 0.5
    max_attempts: int = 5
    window_s: float = 30.0


@dataclass(frozen=True)
class Healthcheck:
    """A command whose exit status 0 means healthy. Only the start-up waits on it here."""

    command: tuple[str, ...]
    timeout_s: float
    start_period_s: float
    start_interval_s: float


@dataclass(frozen=True)
class ServiceSpec:
    """One service. ``depends_on`` maps a service's name to whether it must be healthy, not only started."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1
    depends_on: Mapping[str, bool] = field(default_factory=dict)
    restart: RestartPolicy = RestartPolicy()
    stop_grace_period_s: float = 10.0
    healthcheck: Healthcheck | None = None
    preload: tuple[str, ...] = ()

    @property
    def instances(self) -> tuple[str, ...]:
        """The lasting names of its replicas: ``dit-0``, ``dit-1``; one that is never scaled keeps its number too."""
        return tuple(f"{self.name}-{index}" for index in range(self.replicas))


@dataclass(frozen=True)
class StackSpec:
    """Every service by name."""

    services: Mapping[str, ServiceSpec]

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """The services in the order they start: each level depends only on those before it. They stop in reverse."""
        depths: dict[str, int] = {}

        def depth(name: str, path: tuple[str, ...]) -> int:
            if name in path:
                raise ComposeError(f"depends_on goes in a circle: {' -> '.join((*path, name))}")
            if name not in depths:
                depths[name] = 1 + max((depth(on, (*path, name)) for on in self.services[name].depends_on), default=-1)
            return depths[name]

        for name in self.services:
            depth(name, ())
        deepest = max(depths.values(), default=-1)
        return tuple(tuple(name for name in self.services if depths[name] == level) for level in range(deepest + 1))

    def scaled(self, replicas: Mapping[str, int]) -> "StackSpec":
        """The stack with other replica counts for the services named.

        Raises:
            ComposeError: a service the stack does not have, or a count below 1.
        """
        for name, count in replicas.items():
            if name not in self.services:
                raise ComposeError(f"no service {name!r}; the stack has {', '.join(self.services)}")
            if count < 1:
                raise ComposeError(f"{name}={count}: a service needs at least one replica")
        return StackSpec(
            {name: replace(spec, replicas=replicas.get(name, spec.replicas)) for name, spec in self.services.items()}
        )


def read_stack(variables: Mapping[str, str], path: Path = COMPOSE_FILE) -> StackSpec:
    """The stack that the compose file describes.

    Args:
        variables: what ``${NAME}`` stands for.
        path: the compose file.

    Raises:
        ComposeError: not readable, or a key or value that this reader does not know.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ComposeError(f"cannot read {path}: {error}") from error
    top = _mapping(document, str(path))
    _refuse_unknown(top, _TOP_LEVEL, str(path))
    # Only what is acted on has its variables filled in: the rest may hold ones that only containers have.
    services = {
        name: _service(name, interpolate({key: body[key] for key in body if key not in _FOR_CONTAINERS}, variables))
        for name, body in _mapping(top.get("services"), "services").items()
        if _refuse_unknown(_mapping(body, name), _ACTED_ON | _FOR_CONTAINERS, name)
    }
    for name, spec in services.items():
        for on in spec.depends_on:
            if on not in services:
                raise ComposeError(f"{name}: depends_on names {on!r}, which is no service of this file")
            if spec.depends_on[on] and services[on].healthcheck is None:
                raise ComposeError(f"{name}: waits for {on} to be healthy, but {on} has no healthcheck")
    return StackSpec(services)


def seconds(text: object, where: str) -> float:
    """A Compose duration (``1m30s``, ``100ms``) in seconds.

    Raises:
        ComposeError: not a duration.
    """
    if not isinstance(text, str) or not re.fullmatch(rf"(?:{_DURATION.pattern})+", text):
        raise ComposeError(f"{where}: {text!r} is no duration such as 500ms, 10s or 1m30s")
    return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(text))


def _count(value: object, where: str) -> int:
    """A number of replicas, also where a variable gives it. Of a service with none, nothing runs."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ComposeError(f"{where}: {value!r} is no count of replicas")
    return value


def _service(name: str, body: Mapping[str, Any]) -> ServiceSpec:
    deploy = _mapping(body.get("deploy", {}), f"{name}.deploy")
    _refuse_unknown(deploy, {"replicas", "restart_policy", "resources"}, f"{name}.deploy")
    replicas = _count(deploy.get("replicas", 1), f"{name}.deploy.replicas")
    health = body.get("healthcheck")
    return ServiceSpec(
        name=name,
        command=_strings(body.get("command"), f"{name}.command"),
        environment=_environment(body.get("environment", {}), f"{name}.environment"),
        replicas=replicas,
        depends_on=_dependencies(body.get("depends_on", {}), f"{name}.depends_on"),
        restart=_restart(deploy.get("restart_policy", {}), f"{name}.deploy.restart_policy"),
        stop_grace_period_s=seconds(body.get("stop_grace_period", "10s"), f"{name}.stop_grace_period"),
        healthcheck=None if health is None else _healthcheck(health, f"{name}.healthcheck"),
        preload=_strings(body.get("x-preload", []), f"{name}.x-preload"),
    )


def _restart(value: object, where: str) -> RestartPolicy:
    body = _mapping(value, where)
    _refuse_unknown(body, {"condition", "delay", "max_attempts", "window"}, where)
    condition, attempts = body.get("condition", "any"), body.get("max_attempts", 5)
    if condition not in ("any", "on-failure", "none"):
        raise ComposeError(f"{where}.condition: {condition!r} is none of any, on-failure, none")
    if not isinstance(attempts, int) or attempts < 1:
        raise ComposeError(f"{where}.max_attempts: {attempts!r} is no count of at least 1")
    return RestartPolicy(
        condition,
        seconds(body.get("delay", "500ms"), f"{where}.delay"),
        attempts,
        seconds(body.get("window", "30s"), f"{where}.window"),
    )


def _healthcheck(value: object, where: str) -> Healthcheck:
    body = _mapping(value, where)
    _refuse_unknown(body, {"test", "interval", "timeout", "retries", "start_period", "start_interval"}, where)
    test = _strings(body.get("test"), f"{where}.test")
    if len(test) < 2 or test[0] != "CMD":
        raise ComposeError(f"{where}.test: write it as [CMD, program, argument, ...]")
    return Healthcheck(
        command=test[1:],
        timeout_s=seconds(body.get("timeout", "30s"), f"{where}.timeout"),
        start_period_s=seconds(body.get("start_period", "30s"), f"{where}.start_period"),
        start_interval_s=seconds(body.get("start_interval", "1s"), f"{where}.start_interval"),
    )


def _dependencies(value: object, where: str) -> dict[str, bool]:
    healthy = {}
    for name, body in _mapping(value, where).items():
        condition = _mapping(body, f"{where}.{name}").get("condition")
        if condition not in ("service_started", "service_healthy"):
            raise ComposeError(
                f"{where}.{name}.condition: {condition!r} is neither service_started nor service_healthy"
            )
        healthy[name] = condition == "service_healthy"
    return healthy


def _environment(value: object, where: str) -> dict[str, str]:
    body = _mapping(value, where)
    for name, text in body.items():
        if not isinstance(text, str):
            raise ComposeError(f"{where}.{name}: put {text!r} in quotes; an environment variable is text")
    return dict(body)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ComposeError(f"{where}: expected a mapping of names, got {value!r}")
    return value


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ComposeError(f"{where}: expected a list of strings, got {value!r}")
    return tuple(value)


def _refuse_unknown(body: Mapping[str, Any], known: set[str], where: str) -> bool:
    unknown = sorted(key for key in body if key not in known and not (key.startswith("x-") and "services" in body))
    if unknown:
        raise ComposeError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return True
