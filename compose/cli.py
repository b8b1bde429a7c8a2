"""The ``triptych`` command. What a command needs is imported when it runs, so that ``--help`` answers at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compose.errors import OptionError, StackError

_DEFAULT_URL = "http://127.0.0.1:8080"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except StackError as error:
        print(f"triptych: {error}", file=sys.stderr)
        return 1
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triptych", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="run the whole stack on this machine until Ctrl-C")
    up.add_argument("--host", default="127.0.0.1", help="address the gateway listens on (default %(default)s)")
    up.add_argument("--port", type=int, default=8080, help="its port; 0 takes a free one (default %(default)s)")
    _add_stack_options(up)
    up.set_defaults(run=_run_up)
    video = commands.add_parser("video", help="make one video from one sentence")
    video.add_argument("prompt", help="what is to be seen")
    video.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the MP4 goes")
    video.add_argument("--size", type=size, metavar="WxH", help="in pixels")
    video.add_argument("--frames", type=int)
    video.add_argument("--fps", type=int)
    video.add_argument("--steps", type=int, help="denoising steps")
    video.add_argument("--guidance-scale", type=float)
    video.add_argument("--negative-prompt", help="what is not to be seen")
    video.add_argument("--seed", type=int, help="the same seed gives the same video")
    video.add_argument("--model", help="where the stack serves more than one")
    video.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of the frames too")
    video.add_argument("--timeline", type=Path, metavar="HTML", help="write which slot did which step of it too")
    where = video.add_mutually_exclusive_group()
    where.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
    where.add_argument("--start", action="store_true", help="start a stack of its own for this one video")
    _add_stack_options(video)
    video.set_defaults(run=_run_video)
    for name, run, text in (
        ("status", _run_status, "show the processes of a running stack and its jobs"),
        ("models", _run_models, "show what the served models can be asked for"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--base-url", default=_DEFAULT_URL, help="a running stack (default %(default)s)")
        command.set_defaults(run=run)
    return parser


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
    parser.add_argument("--language-model", metavar="PATH|NAME", help="not served yet")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="keep jobs and videos here between runs")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")


def _run_up(options: argparse.Namespace) -> int:
    from compose.local import StackOptions
    from compose.up import run_up

    _refuse_language_model(options)
    return run_up(
        StackOptions(
            host=options.host,
            port=options.port,
            replicas=dict(options.scales),
            video_model=options.video_model,
            state_dir=options.state_dir,
            log_level=options.log_level,
        )
    )


def _run_video(options: argparse.Namespace) -> int:
    from compose.local import StackOptions
    from compose.video import VideoOrder, run_video

    _refuse_language_model(options)
    order = VideoOrder(
        prompt=options.prompt,
        output=options.output,
        sheet=options.sheet,
        timeline=options.timeline,
        size=options.size,
        frames=options.frames,
        fps=options.fps,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        model=options.model,
    )
    stack = StackOptions(
        port=0,
        replicas=dict(options.scales),
        video_model=options.video_model,
        state_dir=options.state_dir,
        log_level=options.log_level,
    )
    return run_video(order, options.base_url, stack if options.start else None)


def _run_status(options: argparse.Namespace) -> int:
    from compose.status import run_status

    return run_status(options.base_url)


def _run_models(options: argparse.Namespace) -> int:
    from compose.status import run_models

    return run_models(options.base_url)


def _refuse_language_model(options: argparse.Namespace) -> None:
    if options.language_model is not None:
        raise OptionError("--language-model: language models are not served yet; leave it out")


if __name__ == "__main__":
    sys.exit(main())
