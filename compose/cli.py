"""The ``triptych`` command. What a command needs is imported when it runs, so that ``--help`` answers at once."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compose.errors import StackError

if TYPE_CHECKING:
    from compose.local import StackOptions

_DEFAULT_URL = "http://127.0.0.1:8080"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except StackError as error:
        print(f"triptych: {error}", file=sys.stderr)
        return error.status
    return code


def scale(text: str) -> tuple[str, int]:
    """``dit=2`` as a service and its count of replicas."""
    name, equals, count = text.partition("=")
    if not equals or not name or not count.isascii() or not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not SERVICE=COUNT with a count of at least 1, such as dit=2")
    return name, int(count)


def size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` in pixels."""
    width, by, height = text.partition("x")
    if not by or not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 64x64")
    return int(width), int(height)


def finite(text: str) -> float:
    """A number that JSON can say, so neither ``nan`` nor ``inf``."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, such as 2.5")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triptych", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    _add_video(commands)
    _add_chat(commands)
    _add_timeline(commands)
    _add_profile(commands)
    for name, run, text in (
        ("status", _run_status, "show the processes of a running stack and its jobs"),
        ("models", _run_models, "show what the served models can be asked for"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
        command.set_defaults(run=run)
    return parser


def _add_up(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    up = commands.add_parser("up", help="run the whole stack on this machine until Ctrl-C")
    up.add_argument("--host", default="127.0.0.1", help="address the gateway listens on (default %(default)s)")
    up.add_argument("--port", type=int, default=8080, help="its port; 0 takes a free one (default %(default)s)")
    _add_stack_options(up)
    up.set_defaults(run=_run_up)


def _add_video(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    video = commands.add_parser("video", help="make one video from one sentence")
    video.add_argument("prompt", help="what is to be seen")
    video.add_argument("--expand", action="store_true", help="have the language model make a caption of a terse idea")
    video.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the MP4 goes")
    video.add_argument("--size", type=size, metavar="WxH", help="in pixels")
    video.add_argument("--frames", type=int)
    video.add_argument("--fps", type=int)
    video.add_argument("--steps", type=int, help="denoising steps")
    video.add_argument("--guidance-scale", type=finite)
    video.add_argument("--negative-prompt", help="what is not to be seen")
    video.add_argument("--seed", type=int, help="the same seed gives the same video")
    video.add_argument("--model", help="where the stack serves more than one")
    video.add_argument("--priority", type=int, metavar="N", help="-100 to 100; what waits with a higher one goes first")
    video.add_argument("--deadline", type=finite, metavar="SECONDS", help="from now, by when it should be done")
    video.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of the frames too")
    video.add_argument("--timeline", type=Path, metavar="HTML", help="write which slot did which step of it too")
    video.add_argument("--trace", type=Path, metavar="JSON", help="the same for chrome://tracing and Perfetto")
    where = video.add_mutually_exclusive_group()
    where.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
    where.add_argument("--start", action="store_true", help="start a stack of its own for this one video")
    _add_stack_options(video)
    video.set_defaults(run=_run_video)


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = commands.add_parser("chat", help="ask the language model one thing")
    chat.add_argument("message", help="what to ask")
    chat.add_argument("--system", metavar="TEXT", help="how the model should answer")
    chat.add_argument("--model", help="where the stack serves more than one")
    chat.add_argument(
        "--max-tokens", type=int, metavar="N", help="of the answer (default: what the context has room for)"
    )
    chat.add_argument("--temperature", type=finite, help="0 to 2; 0 is always the likeliest answer")
    chat.add_argument("--seed", type=int, help="the same seed gives the same answer")
    chat.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
    chat.set_defaults(run=_run_chat)


def _add_timeline(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    timeline = commands.add_parser("timeline", help="show which slot did which step of which video")
    which = timeline.add_mutually_exclusive_group(required=True)
    which.add_argument("videos", nargs="*", default=[], metavar="ID", help="of these videos")
    which.add_argument("--all", action="store_true", help="of all videos that the stack has finished")
    which.add_argument("--since", metavar="DURATION", help="of those ordered within the last 30s, 10m, 2h, ...")
    timeline.add_argument("-o", "--output", type=Path, metavar="HTML", help="where the page goes")
    timeline.add_argument("--trace", type=Path, metavar="JSON", help="where a file for chrome://tracing, Perfetto goes")
    timeline.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
    timeline.set_defaults(run=_run_timeline)


def _add_profile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    profile = commands.add_parser("profile", help="measure steps and prefill on this machine, for triptych up to go by")
    profile.add_argument(
        "-o", "--output", type=Path, default=Path("rib.json"), metavar="FILE", help="(default %(default)s)"
    )
    profile.add_argument(
        "--video-model", default="demo", metavar="PATH|NAME", help="a local folder, a hub name, or none"
    )
    profile.add_argument(
        "--language-model", default="demo", metavar="PATH|NAME", help="a local folder, a hub name, or none"
    )
    profile.add_argument(
        "--slots", type=int, metavar="N", help="measure on 1, 2, 4, ... up to N (default: the GPUs; without any, 2)"
    )
    profile.add_argument("--size", dest="sizes", type=size, nargs="+", metavar="WxH", help="only these")
    profile.add_argument("--frames", type=int, nargs="+", metavar="N", help="only these")
    profile.add_argument("--repeats", type=int, default=5, metavar="N", help="readings of each (default %(default)s)")
    profile.add_argument("--warm-up", type=int, default=2, metavar="N", help="not counted (default %(default)s)")
    profile.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default %(default)s)")
    profile.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default %(default)s)")
    profile.add_argument("--sequence", choices=("dsp", "ulysses"), default="dsp", help="how a group shares the tokens")
    profile.add_argument("--no-guidance-parallel", action="store_true", help="share out nothing but tokens")
    profile.add_argument("--alone", action="store_true", help="leave the other slots idle (default: they do the same)")
    profile.add_argument("--in-stack", action="store_true", help="measure videos that a whole stack makes")
    profile.add_argument(
        "--rule", choices=("largest-gain", "threshold"), default="largest-gain", help="what is optimal"
    )
    profile.add_argument("--threshold", type=float, default=0.4, help="least gain that pays (default %(default)s)")
    profile.set_defaults(run=_run_profile)


def _add_stack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="scales",
        type=scale,
        action="append",
        default=[],
        metavar="SERVICE=COUNT",
        help="how many of a service to run, such as dit=2 (repeatable)",
    )
    parser.add_argument("--video-model", default="demo", metavar="PATH|NAME", help="a local folder or a hub name")
    parser.add_argument(
        "--language-model", metavar="PATH|NAME", help="a local folder, a hub name, demo (the default), or none"
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="keep jobs and videos here between runs")
    parser.add_argument("--policy", metavar="NAME", help="how slots are given out: fifo, ddit, sdop:2, ...")
    parser.add_argument("--rib", type=Path, metavar="FILE", help="what triptych profile wrote (default: the paper's)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record what happens, to be simulated or replayed")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")


def _run_up(options: argparse.Namespace) -> int:
    from compose.up import run_up

    return run_up(_stack_options(options, options.host, options.port))


def _run_video(options: argparse.Namespace) -> int:
    from compose.video import VideoOrder, run_video

    order = VideoOrder(
        prompt=options.prompt,
        output=options.output,
        sheet=options.sheet,
        timeline=options.timeline,
        trace=options.trace,
        size=options.size,
        frames=options.frames,
        fps=options.fps,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        model=options.model,
        priority=options.priority,
        deadline_s=options.deadline,
        expand=options.expand,
    )
    # One plain video has no use for language.
    stack = _stack_options(options, "127.0.0.1", 0, language_model=None if options.expand else "none")
    return run_video(order, options.base_url, stack if options.start else None)


def _run_chat(options: argparse.Namespace) -> int:
    from compose.chat import Question, run_chat

    question = Question(
        message=options.message,
        system=options.system,
        model=options.model,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    return run_chat(question, options.base_url)


def _run_timeline(options: argparse.Namespace) -> int:
    from compose.timeline.command import Choice, run_timeline

    choice = Choice(tuple(options.videos), options.since)
    return run_timeline(options.base_url, choice, options.output, options.trace)


def _run_profile(options: argparse.Namespace) -> int:
    from compose.profiling.command import run_profile
    from compose.profiling.plan import ProfileOptions

    return run_profile(
        ProfileOptions(
            output=options.output,
            video_model=options.video_model,
            language_model=options.language_model,
            slots=options.slots,
            sizes=tuple(options.sizes or ()),
            frames=tuple(options.frames or ()),
            repeats=options.repeats,
            warm_up=options.warm_up,
            device=options.device,
            threads=options.threads,
            sequence=options.sequence,
            guidance_parallel=not options.no_guidance_parallel,
            alone=options.alone,
            in_stack=options.in_stack,
            rule=options.rule.replace("-", "_"),
            threshold=options.threshold,
        )
    )


def _run_status(options: argparse.Namespace) -> int:
    from compose.status import run_status

    return run_status(options.base_url)


def _run_models(options: argparse.Namespace) -> int:
    from compose.status import run_models

    return run_models(options.base_url)


def _stack_options(
    options: argparse.Namespace, host: str, port: int, language_model: str | None = None
) -> "StackOptions":
    """``language_model`` applies where the options name none."""
    from compose.local import StackOptions

    return StackOptions(
        host=host,
        port=port,
        replicas=dict(options.scales),
        video_model=options.video_model,
        language_model=options.language_model or language_model,
        state_dir=options.state_dir,
        policy=options.policy,
        rib=options.rib,
        record=options.record,
        log_level=options.log_level,
    )


if __name__ == "__main__":
    sys.exit(main())
