"""The stack as plain processes on this machine: the compose file's services, loopback only, one folder of files."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.language.settings import model_name
from common.policies.language.language_costs import LanguageCosts, WrongLanguageCosts
from common.policies.language.prefill_profile import PrefillProfile, WrongPrefillProfile
from common.policies.video.registry import UnknownPolicy, make_policy
from common.policies.video.rib import Rib, WrongRib
from compose.errors import OptionError, StartError
from compose.launch import CommandLauncher, ForkLauncher, Launcher
from compose.logs import LogFollower
from compose.ports import checked_port, free_port, kept_port
from compose.readiness import wait_ready
from compose.rundir import RunDirectory, run_directory
from compose.spec import COMPOSE_FILE, ServiceSpec, StackSpec, read_stack
from compose.supervisor import Supervisor, tail

Report = Callable[[str], None]

BROKER_HOST = "127.0.0.1"
"""Where a stack's broker listens: nobody on another machine is to reach it."""

_NO_MODEL = "none"
_PER_REPLICA = ("TRIPTYCH_INSTANCE", "TRIPTYCH_SLOT")


@dataclass(frozen=True)
class StackOptions:
    """What ``triptych up`` can be told. ``port`` 0 takes a free one; without ``state_dir`` nothing is kept.

    ``language_model`` is a folder, a hub name, ``demo`` or ``none``; None leaves it to the environment.
    ``policy``, ``rib`` (a profile of this machine) and ``record`` (a file for what happened) are the scheduler's; None
    leaves each to the environment and the compose file.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    replicas: Mapping[str, int] = field(default_factory=dict)
    video_model: str = "demo"
    language_model: str | None = None
    state_dir: Path | None = None
    policy: str | None = None
    rib: Path | None = None
    record: Path | None = None
    log_level: str = "info"
    start_timeout_s: float = 180.0
    compose_file: Path = COMPOSE_FILE


@dataclass(frozen=True)
class LocalStack:
    """A stack that is up. ``supervisor.failed`` breaks when it cannot be kept up."""

    base_url: str
    directory: RunDirectory
    supervisor: Supervisor


@contextlib.asynccontextmanager
async def running_stack(
    options: StackOptions, report: Report, on_supervised: Callable[[Supervisor], None] | None = None
) -> AsyncIterator[LocalStack]:
    """Start the stack, run the block once it is ready, then drain and stop it, whatever happens.

    Args:
        options: what to run.
        report: told what a person should know.
        on_supervised: given the supervisor before anything starts, so that a stop can be hurried.

    Raises:
        OptionError: an option does not fit this machine or this stack.
        StartError: the stack did not become ready in time.
        CrashLoopError: a service kept dying while it started.
    """
    # Looked at first: everything that can be refused at once.
    check_scheduling(options)
    read_stack({}, options.compose_file).scaled(options.replicas)
    with _port(options) as port, run_directory(options.state_dir) as directory:
        stack = read_stack(variable_values(options, directory, port), options.compose_file).scaled(options.replicas)
        forking = _fork_launcher(stack, directory)
        executing = CommandLauncher()

        def launcher_of(spec: ServiceSpec) -> Launcher:
            return forking if spec.preload else executing

        supervisor = Supervisor(stack, launcher_of, _environment, directory.logs, report)
        if on_supervised is not None:
            on_supervised(supervisor)
        follower = LogFollower(directory.logs, report, verbose=options.log_level == "debug")
        following = asyncio.create_task(follower.run(), name="logs")
        base_url = f"http://{_reachable(options.host)}:{port}"
        try:
            if any(spec.preload for spec in stack.services.values()):
                forking.start()
            await _start(supervisor, stack, base_url, options.start_timeout_s)
            supervisor.settled.set()
            yield LocalStack(f"http://{_bracketed(options.host)}:{port}", directory, supervisor)
        finally:
            await supervisor.stop()
            await forking.close()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            follower.catch_up()


@contextlib.contextmanager
def _port(options: StackOptions) -> Iterator[int]:
    """Where the gateway will listen. It starts last, and anew where it dies: a port of our choice is kept for it."""
    if options.port:
        yield checked_port(options.host, options.port)
        return
    with kept_port(options.host) as port:
        yield port


async def _start(supervisor: Supervisor, stack: StackSpec, base_url: str, timeout_s: float) -> None:
    # The broker is no member; whoever waits for it finds it healthy first.
    waited_for = {name for spec in stack.services.values() for name, healthy in spec.depends_on.items() if healthy}
    expected = [name for spec in stack.services.values() if spec.name not in waited_for for name in spec.instances]
    missing: set[str] = set()

    async def become_ready() -> None:
        await supervisor.start()
        await wait_ready(base_url, expected, missing)

    starting = asyncio.create_task(become_ready(), name="start")
    try:
        done, _ = await asyncio.wait(
            {starting, supervisor.failed}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for finished in done:
            finished.result()
        if not done:
            raise StartError(_late(supervisor, missing, timeout_s))
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


def _late(supervisor: Supervisor, missing: set[str], timeout_s: float) -> str:
    first = min(missing, default="")
    log = f" The end of {first}'s log:\n{tail(supervisor.replicas[first].log)}" if first else ""
    return f"not ready after {timeout_s:g} s: waiting for {', '.join(sorted(missing)) or 'the gateway'}.{log}"


def variable_values(options: StackOptions, directory: RunDirectory, port: int) -> dict[str, str]:
    """What the compose file's variables stand for here; the caller's own environment may set any other."""
    nats_port = _nats_port()
    return {
        # Loopback for the tensors too, and for DiT workers that share a video, unless the caller knows better.
        "TRIPTYCH_UCX_NET_DEVICES": "lo",
        "TRIPTYCH_MEETING_HOST": "127.0.0.1",
        **os.environ,
        "TRIPTYCH_HOST": options.host,
        "TRIPTYCH_PORT": str(port),
        "TRIPTYCH_NATS_HOST": BROKER_HOST,
        "TRIPTYCH_NATS_PORT": str(nats_port),
        "TRIPTYCH_NATS_URL": f"nats://{BROKER_HOST}:{nats_port}",
        "TRIPTYCH_NATS_STORE": str(directory.broker_store),
        "TRIPTYCH_CACHE_DIR": str(directory.cache),
        "TRIPTYCH_VIDEO_MODEL": model_location(options.video_model, "--video-model"),
        "TRIPTYCH_LOG_LEVEL": options.log_level,
        **_language_variables(options),
        **_profile_variables(options),
        **scheduling_variables(options),
    }


def _nats_port() -> int:
    """A free one, unless the caller's environment names one, so as to reach the broker too."""
    asked = os.environ.get("TRIPTYCH_NATS_PORT")
    if asked is None:
        return free_port(BROKER_HOST)
    if not asked.isascii() or not asked.isdigit():
        raise OptionError(f"TRIPTYCH_NATS_PORT={asked}: ports go from 1 to 65535")
    return checked_port(BROKER_HOST, int(asked), "TRIPTYCH_NATS_PORT")


def _language_variables(options: StackOptions) -> dict[str, str]:
    asked = options.language_model
    name = os.environ.get("TRIPTYCH_LANGUAGE_MODEL", "demo") if asked is None else asked
    if name in ("", _NO_MODEL):
        return {"TRIPTYCH_LANGUAGE_MODEL": "", "TRIPTYCH_DECODE_REPLICAS": "0", "TRIPTYCH_PREFILL_REPLICAS": "0"}
    return {"TRIPTYCH_LANGUAGE_MODEL": model_location(name, "--language-model")}


def _profile_variables(options: StackOptions) -> dict[str, str]:
    """What the profile found for this very model, unless the environment says otherwise: the best chunk, and costs."""
    if options.rib is None:
        return {}
    text = options.rib.read_text(encoding="utf-8")
    served = model_name(options.language_model or os.environ.get("TRIPTYCH_LANGUAGE_MODEL", "demo"))
    chunks, costs = PrefillProfile.from_json(text), LanguageCosts.from_json(text)
    found = {}
    if chunks is not None and chunks.model == served:
        found["TRIPTYCH_CHUNK_TOKENS"] = str(chunks.chunk_tokens)
    if costs is not None and costs.model == served:
        found["TRIPTYCH_COSTS"] = str(options.rib.resolve())
    return {name: value for name, value in found.items() if name not in os.environ}


def scheduling_variables(options: StackOptions) -> dict[str, str]:
    """The scheduler's variables, as far as they were asked for. Paths in full: the services run elsewhere."""
    rib = options.rib if options.rib is not None and _has_kinds(options.rib) else None
    asked = {"TRIPTYCH_POLICY": options.policy, "TRIPTYCH_RIB": rib, "TRIPTYCH_RECORD": options.record}
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in asked.items()
        if value is not None
    }


def _has_kinds(profile: Path) -> bool:
    """Whether the file has a profile of video; it may have one of prefill alone."""
    return "kinds" in json.loads(profile.read_text(encoding="utf-8"))


def check_scheduling(options: StackOptions) -> None:
    """Raises OptionError for what the scheduler would refuse."""
    if options.policy is not None:
        try:
            make_policy(options.policy)
        except UnknownPolicy as error:
            raise OptionError(f"--policy: {error}") from error
    if options.rib is not None:
        try:
            text = options.rib.read_text(encoding="utf-8")
            # One of them may have been left out, but not both.
            LanguageCosts.from_json(text)
            if PrefillProfile.from_json(text) is None or "kinds" in json.loads(text):
                Rib.from_json(text)
        except OSError as error:
            raise OptionError(f"--rib {options.rib}: {error.strerror}; triptych profile writes one") from error
        except (WrongRib, WrongPrefillProfile, WrongLanguageCosts, UnicodeDecodeError) as error:
            raise OptionError(f"--rib {options.rib} is no profile ({error}); triptych profile writes one") from error
    if options.record is not None and not options.record.resolve().parent.is_dir():
        raise OptionError(f"--record {options.record}: the folder does not exist; make it first")
    if options.record is not None and options.record.is_dir():
        raise OptionError(f"--record {options.record}: this is a folder; name a file")


def _environment(spec: ServiceSpec, index: int) -> dict[str, str]:
    """A replica's whole environment: the caller's, without settings of ours that the compose file does not make."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRIPTYCH_")}
    values = {"TRIPTYCH_INSTANCE": spec.instances[index], "TRIPTYCH_SLOT": str(index)}
    return inherited | {
        name: values[name] if name in _PER_REPLICA and not value else value for name, value in spec.environment.items()
    }


def _fork_launcher(stack: StackSpec, directory: RunDirectory) -> ForkLauncher:
    """One fork server for all services that are forked, with what they have in common."""
    forked = [spec for spec in stack.services.values() if spec.preload and spec.replicas]
    environments = [set(_environment(spec, 0).items()) for spec in forked]
    common = dict(set.intersection(*environments)) if environments else {}
    preload = (
        [module for module in forked[0].preload if all(module in spec.preload for spec in forked)] if forked else []
    )
    return ForkLauncher(common, preload, directory.path / "logs" / "forkserver.log")


def model_location(name: str, option: str) -> str:
    """A model that is a local folder by its full path: the services run elsewhere.

    Raises:
        OptionError: it looks like a folder and is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if name.startswith((".", "/", "~")):
        raise OptionError(f"{option} {name}: no such folder")
    return name


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, _bracketed(host))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
