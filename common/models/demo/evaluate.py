"""Makes videos from wordings the model never saw, measures them, and shows them on one sheet.

python -m common.models.demo.evaluate --videos 96 --json figures.json --sheet sheet.png
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from common.models.demo.captions import held_out_caption
from common.models.demo.clips import COLOURS, FRAME_COUNTS, SIZES, Action, Frames, Shape, Subject, shapes_for
from common.models.demo.export import WEIGHTS
from common.models.demo.measure import Measurement, measure
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec

_SHEET_FRAMES = 8
_SHEET_CELL = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One video to make: a held-out wording of a subject, a format, a seed."""

    prompt: str
    subject: Subject
    width: int
    height: int
    frames: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    case: Case
    measured: Measurement
    video: Frames


def make_cases(count: int, seed: int, formats: Sequence[tuple[int, int, int]] | None = None) -> list[Case]:
    """`count` cases in which colours, shapes, actions and (width, height, frames) formats are evenly mixed."""
    if formats is None:
        formats = [(width, height, frames) for frames in FRAME_COUNTS for width, height in SIZES]
    rng = np.random.default_rng(seed)
    columns = [_even(rng, options, count) for options in (list(COLOURS), list(Shape), list(Action), list(formats))]
    cases = []
    for index, (colour, shape, action, (width, height, frames)) in enumerate(zip(*columns, strict=True)):
        able = shapes_for(action)
        subject = Subject(colour, shape if shape in able else able[index % len(able)], action)
        prompt = held_out_caption(subject, rng)
        cases.append(Case(prompt, subject, width, height, frames, seed=seed * 1000 + index))
    return cases


def _even(rng: np.random.Generator, options: Sequence[T], count: int) -> list[T]:
    """`count` options, each as often as the others, in random order."""
    order: list[T] = []
    while len(order) < count:
        order.extend(options[int(index)] for index in rng.permutation(len(options)))
    return order[:count]


def run_cases(
    pipeline: OpenSoraPipeline,
    cases: Iterable[Case],
    steps: int | None = None,
    guidance_scale: float | None = None,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Make and measure every case; steps and guidance are the model's defaults unless given."""
    outcomes = []
    for case in cases:
        video = pipeline.generate(
            case.prompt,
            case.seed,
            steps=steps,
            guidance_scale=guidance_scale,
            frames=case.frames,
            width=case.width,
            height=case.height,
        ).frames
        outcomes.append(Outcome(case, measure(video), video))
        if on_done is not None:
            on_done(outcomes[-1])
    return outcomes


def shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of the videos with the right colour, shape, smooth right motion, and all three."""
    count = max(1, len(outcomes))
    return {
        "colour": sum(item.measured.colour_right(item.case.subject) for item in outcomes) / count,
        "shape": sum(item.measured.shape_right(item.case.subject) for item in outcomes) / count,
        "action": sum(item.measured.action == item.case.subject.action for item in outcomes) / count,
        "motion_smooth": sum(item.measured.motion_right(item.case.subject) for item in outcomes) / count,
        "all": sum(item.measured.all_right(item.case.subject) for item in outcomes) / count,
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """The shares, for all videos and by action, shape and format, as a Markdown table."""
    groups: dict[str, list[Outcome]] = {"all videos": list(outcomes)}
    for item in outcomes:
        case = item.case
        for name in (str(case.subject.action), str(case.subject.shape), f"{case.width}x{case.height}x{case.frames}"):
            groups.setdefault(name, []).append(item)
    lines = [
        "| videos | count | colour | shape | action | action, smooth | all |",
        "| --- | ---: " + "| ---: " * 5 + "|",
    ]
    for name, members in groups.items():
        cells = " | ".join(f"{value:.1%}" for value in shares(members).values())
        lines.append(f"| {name} | {len(members)} | {cells} |")
    return "\n".join(lines)


def report(outcomes: Sequence[Outcome], seconds: float) -> dict[str, object]:
    """Everything measured, as JSON values."""
    return {
        "videos": len(outcomes),
        "seconds": round(seconds, 1),
        "shares": shares(outcomes),
        "cases": [
            {
                "prompt": item.case.prompt,
                "format": [item.case.width, item.case.height, item.case.frames],
                "seed": item.case.seed,
                "subject": asdict(item.case.subject),
                "measured": asdict(item.measured),
                "all_right": item.measured.all_right(item.case.subject),
            }
            for item in outcomes
        ],
    }


def contact_sheet(outcomes: Sequence[Outcome], columns: int = 2) -> Image.Image:
    """Eight frames of each video in a row; videos with something wrong are framed in red."""
    width = _SHEET_FRAMES * _SHEET_CELL + 12
    rows = -(-len(outcomes) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (_SHEET_CELL + 8)), (12, 12, 14))
    for index, item in enumerate(outcomes):
        left, top = (index % columns) * width + 4, (index // columns) * (_SHEET_CELL + 8) + 4
        if not item.measured.all_right(item.case.subject):
            sheet.paste((200, 30, 30), (left - 3, top - 3, left + width - 9, top + _SHEET_CELL + 3))
        for column, frame in enumerate(np.linspace(0, len(item.video) - 1, _SHEET_FRAMES).round().astype(int)):
            picture = Image.fromarray(item.video[frame])
            picture.thumbnail((_SHEET_CELL, _SHEET_CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * _SHEET_CELL, top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model on wordings it never saw.")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="model folder (default: the shipped weights)")
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here (PNG)")
    options = parser.parse_args()
    pipeline = OpenSoraPipeline(load_spec(options.model), options.device)
    started_s = time.monotonic()
    outcomes = run_cases(
        pipeline, make_cases(options.videos, options.seed), options.steps, options.guidance, _print_wrong
    )
    print(table(outcomes))
    if options.json is not None:
        options.json.write_text(json.dumps(report(outcomes, time.monotonic() - started_s), indent=1) + "\n")
    if options.sheet is not None:
        contact_sheet(outcomes).save(options.sheet)


def _print_wrong(item: Outcome) -> None:
    if not item.measured.all_right(item.case.subject):
        case, measured = item.case, item.measured
        print(
            f"wrong: {case.prompt!r} {case.width}x{case.height}x{case.frames}: {measured.colour} {measured.shape} "
            f"{measured.action}, smooth {measured.smooth}, residual {measured.residual:.2f}, "
            f"drift {measured.drift_px:.2f}, area variation {measured.area_variation:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
