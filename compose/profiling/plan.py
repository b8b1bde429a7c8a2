"""What is to be measured: kinds of video, degrees of parallelism, how often. No torch here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.models.opensora.errors import ModelLoadError
from common.models.opensora.spec import VideoModelSpec, load_spec
from common.policies.video.rib import DegreeRule, VideoKind, powers_of_two
from compose.errors import OptionError
from compose.local import model_location
from compose.spec import read_stack

Value = TypeVar("Value")

_NONE = "none"


@dataclass(frozen=True)
class ProfileOptions:
    """What ``triptych profile`` can be told.

    Either model may be ``none``, which leaves out what it does. Without ``slots``: as many as this machine has GPUs, or
    without any as ``triptych up`` starts. Without ``sizes`` and ``frames``: all that the model makes. ``alone``: the
    slots that do not measure are idle meanwhile; otherwise they do the same, which is what a step takes on a busy
    machine. ``in_stack``: measure videos that a whole stack makes, see ``compose.profiling.in_stack``. ``sequence`` and
    ``guidance_parallel``: how a group shares a step, see ``common.models.opensora.parallel``.
    """

    output: Path
    video_model: str = "demo"
    language_model: str = "demo"
    slots: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    frames: tuple[int, ...] = ()
    repeats: int = 5
    warm_up: int = 2
    device: str = "auto"
    threads: int = 1
    sequence: str = "dsp"
    guidance_parallel: bool = True
    alone: bool = False
    in_stack: bool = False
    rule: str = DegreeRule.LARGEST_GAIN.value
    threshold: float = 0.4


@dataclass(frozen=True)
class Plan:
    """The models' locations, and what is measured of video, smallest kind first. A model left out has no location."""

    model: str
    language_model: str
    kinds: tuple[VideoKind, ...]
    options: ProfileOptions


def make_plan(options: ProfileOptions) -> Plan:
    """Everything that can be refused before a process is started.

    Raises:
        OptionError: an option does not fit; says what would.
    """
    for name, value, least in (
        ("--slots", options.slots, 1),
        ("--repeats", options.repeats, 1),
        ("--warm-up", options.warm_up, 0),
        ("--threads", options.threads, 1),
    ):
        if value is not None and value < least:
            raise OptionError(f"{name} {value}: give {least} or more")
    if not 0 < options.threshold < 1:
        raise OptionError(f"--threshold {options.threshold:g}: give a share of the step time between 0 and 1, as 0.4")
    language_model = _location(options.language_model, "--language-model")
    model = _location(options.video_model, "--video-model")
    if not model:
        if not language_model:
            raise OptionError("--video-model none, --language-model none: leave one out, or nothing is measured")
        return Plan("", language_model, (), options)
    try:
        spec = load_spec(model)
    except ModelLoadError as error:
        raise OptionError(f"--video-model: {error}") from error
    return Plan(model, language_model, _kinds(spec, options), options)


def _location(name: str, option: str) -> str:
    return "" if name == _NONE else model_location(name, option)


def _kinds(spec: VideoModelSpec, options: ProfileOptions) -> tuple[VideoKind, ...]:
    sizes = _chosen("--size", options.sizes, spec.sizes, lambda size: f"{size[0]}x{size[1]}", spec.name)
    frames = _chosen("--frames", options.frames, spec.frames, str, spec.name)
    kinds = {VideoKind(width, height, count) for width, height in sizes for count in frames}
    return tuple(sorted(kinds, key=lambda kind: (kind.volume, kind.width, kind.frames)))


def _chosen(
    option: str, asked: Sequence[Value], there: Sequence[Value], text: Callable[[Value], str], model: str
) -> Sequence[Value]:
    for value in asked:
        if value not in there:
            raise OptionError(f"{option} {text(value)}: {model} makes {', '.join(map(text, there))}")
    return asked or there


def slots_of(options: ProfileOptions, gpus: int) -> int:
    """How many slots are measured on a machine with so many GPUs of the kind in use (0: on its CPU).

    Raises:
        OptionError: more slots than GPUs, or a GPU was asked for and there is none.
    """
    if options.device == "cuda" and not gpus:
        raise OptionError("--device cuda: torch finds no GPU on this machine")
    if options.slots is None:
        return gpus or read_stack({}).services["dit"].replicas
    if gpus and options.slots > gpus:
        raise OptionError(f"--slots {options.slots}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    return options.slots


def degrees_of(slots: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the slots."""
    return tuple(powers_of_two(slots))


def teams_of(degree: int, slots: int, alone: bool) -> Iterable[tuple[int, ...]]:
    """The groups that work at the same time: one, or as many as there is room for."""
    count = 1 if alone else slots // degree
    return (tuple(range(team * degree, (team + 1) * degree)) for team in range(count))
