"""What a person's environment says in vain: variables that the stack does not know, and those that options overrule."""

from collections.abc import Iterator, Mapping

from common.runtime.variables import stack_variables, unknown_variables
from compose.local import StackOptions

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
