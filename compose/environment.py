"""What a person's environment says in vain.

Variables that the stack does not know, those that options overrule, and those by which containers find each other and
their files, which processes on one machine do in their own way.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from common.runtime.variables import stack_variables, unknown_variables
from compose.local import BROKER_HOST, StackOptions
from compose.rundir import RunDirectory

_WARNING = "triptych: warning:"


def unknown(environment: Mapping[str, str], options: StackOptions) -> Iterator[str]:
    """A line for each variable of ours that the compose file does not know."""
    for name, nearest in unknown_variables(environment, stack_variables(options.compose_file)).items():
        meant = f"; did you mean {nearest}?" if nearest else ""
        yield f"{_WARNING} {name} is no variable of this stack and has no effect{meant}"


def overruled(environment: Mapping[str, str], options: StackOptions) -> Iterator[str]:
    """A line for each variable that ``triptych up`` says itself, otherwise, by one of its options."""
    said = {
        "TRIPTYCH_HOST": ("--host", options.host),
        "TRIPTYCH_PORT": ("--port", str(options.port)),
        "TRIPTYCH_VIDEO_MODEL": ("--video-model", options.video_model),
        "TRIPTYCH_LOG_LEVEL": ("--log-level", options.log_level),
    }
    for name, (option, value) in said.items():
        if environment.get(name, value) != value:
            yield f"{_WARNING} {name} has no effect here, use {option} (which is {value} now)"


def set_aside(environment: Mapping[str, str], options: StackOptions) -> Iterator[str]:
    """A line for each variable that any stack of plain processes sets itself, otherwise."""
    for name, (value, instead) in _own(environment, options).items():
        if environment.get(name) not in (None, "", value):
            yield f"{_WARNING} {name} has no effect here: {instead}"


def _own(environment: Mapping[str, str], options: StackOptions) -> dict[str, tuple[str | None, str]]:
    """Such variables with their values, None where that is known only later, and with what to do in their place."""
    url = f"nats://{BROKER_HOST}:{environment['TRIPTYCH_NATS_PORT']}" if "TRIPTYCH_NATS_PORT" in environment else None
    kept = None if options.state_dir is None else RunDirectory(options.state_dir.absolute(), kept=True)
    return {
        "TRIPTYCH_NATS_HOST": (BROKER_HOST, f"the broker listens on {BROKER_HOST}"),
        "TRIPTYCH_NATS_URL": (
            url,
            f"the stack has its own broker; TRIPTYCH_NATS_PORT chooses its port on {BROKER_HOST}",
        ),
        "TRIPTYCH_NATS_STORE": _files("the broker's files", None if kept is None else kept.broker_store),
        "TRIPTYCH_CACHE_DIR": _files("the cache store's files", None if kept is None else kept.cache),
    }


def _files(whose: str, folder: Path | None) -> tuple[str | None, str]:
    if folder is None:
        return None, f"{whose} are kept in a temporary folder; use --state-dir"
    return str(folder), f"{whose} are kept in {folder} (by --state-dir)"
