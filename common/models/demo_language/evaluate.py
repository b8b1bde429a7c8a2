"""Measures the demo language model: ideas that training never saw, odd ones written by hand, small talk, and films.

python -m common.models.demo_language.evaluate --json figures.json
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from common.models.demo.clips import Action, Shape
from common.models.demo.export import WEIGHTS as VIDEO_WEIGHTS
from common.models.demo.measure import Measurement, measure
from common.models.demo.reading import read_caption
from common.models.demo_language.answering import LanguageModel, load_language_model
from common.models.demo_language.ideas import Idea, Stated, draw_idea
from common.models.demo_language.settings import WEIGHTS
from common.models.demo_language.talk import TALKS
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec

ODD_IDEAS = Path(__file__).parent / "odd_ideas.json"
SMALL_TALK = Path(__file__).parent / "small_talk.json"
FILMED = (
    "ball go right, red",
    "BIG BLUE BOX FALLING DOWN!!!",
    "star spin green",
    "tringle up orange",
    "l-r teal block",
    "boing boing boing green ball",
    "snowball falls",
    "roter Kreis nach rechts",
)
"""Odd ideas that films are made of."""


@dataclass(frozen=True)
class Written:
    """What became of one idea. `right`: the caption is in the video model's grammar and has all that was stated;
    `as_expected`: it is the caption that the rules give, word for word (None where only facts were written down)."""

    idea: str
    stated: Stated
    caption: str
    well_formed: bool
    right: bool
    as_expected: bool | None


@dataclass(frozen=True)
class Answered:
    """A message that is no idea, and whether its answer is one that suits it."""

    message: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Filmed:
    """Two films of one idea with one seed: of its caption, and of the idea as it is."""

    idea: str
    caption: str
    colour_right: bool
    shape_right: bool
    motion_right: bool
    right_without_caption: bool


class Figures(TypedDict):
    """Everything measured, as JSON values: counts, shares by name, and the single cases."""

    ideas: int
    well_typed_ideas: int
    odd_ideas: int
    talks: int
    shares: dict[str, float]
    wrong: list[dict[str, object]]
    films: list[dict[str, object]]


def held_out_ideas(count: int, seed: int) -> list[Idea]:
    """Ideas whose words and templates training keeps out."""
    rng = np.random.default_rng(seed)
    return [draw_idea(rng, held_out=True) for _ in range(count)]


def odd_ideas() -> list[tuple[str, Stated]]:
    """The hand-written ideas with what each states."""
    return [
        (
            item["idea"],
            Stated(
                item["colour"],
                None if item["shape"] is None else Shape(item["shape"]),
                None if item["action"] is None else Action(item["action"]),
            ),
        )
        for item in json.loads(ODD_IDEAS.read_text(encoding="utf-8"))
    ]


def write_captions(
    language_model: LanguageModel, ideas: Sequence[tuple[str, Stated]], expected: Sequence[str] | None = None
) -> list[Written]:
    """The model's caption of each idea, judged."""
    captions = language_model.answers([text for text, _ in ideas])
    written = []
    for index, ((text, stated), caption) in enumerate(zip(ideas, captions, strict=True)):
        subject = read_caption(caption)
        as_expected = None if expected is None else caption == expected[index]
        written.append(Written(text, stated, caption, subject is not None, stated.agrees(subject), as_expected))
    return written


def small_talk(language_model: LanguageModel) -> list[Answered]:
    """The model's answers to the hand-written messages that are no ideas, judged."""
    cases = json.loads(SMALL_TALK.read_text(encoding="utf-8"))
    answers = language_model.answers([case["message"] for case in cases])
    return [
        Answered(case["message"], answer, any(answer == TALKS[kind].answer for kind in case["kinds"]))
        for case, answer in zip(cases, answers, strict=True)
    ]


def film(language_model: LanguageModel, ideas: Sequence[str], seed: int) -> list[Filmed]:
    """Make and measure both films of each of the odd ideas, at the demo video model's default format."""
    pipeline = OpenSoraPipeline(load_spec(VIDEO_WEIGHTS))
    stated_by_idea = dict(odd_ideas())
    filmed = []
    for idea, caption in zip(ideas, language_model.answers(ideas), strict=True):
        stated = stated_by_idea[idea]
        measured, unaided = (measure(pipeline.generate(prompt, seed).frames) for prompt in (caption, idea))
        filmed.append(Filmed(idea, caption, *_judge(measured, stated), all(_judge(unaided, stated))))
        print(f"{idea!r}: {caption!r}: {filmed[-1]}", flush=True)
    return filmed


def _judge(measured: Measurement, stated: Stated) -> tuple[bool, bool, bool]:
    """Whether colour, shape and motion are as stated, the motion smooth."""
    return (
        stated.colour in (None, measured.colour),
        stated.shape in (None, measured.shape),
        stated.action in (None, measured.action) and measured.smooth,
    )


def evaluate(folder: Path, ideas: int = 1000, seed: int = 7) -> Figures:
    """Measure a model folder."""
    language_model = load_language_model(folder)
    drawn = held_out_ideas(ideas, seed)
    generated = write_captions(
        language_model, [(idea.text, idea.stated) for idea in drawn], [idea.caption for idea in drawn]
    )
    odd = write_captions(language_model, odd_ideas())
    talk = small_talk(language_model)
    filmed = film(language_model, FILMED, seed)
    return {
        "ideas": len(generated),
        "well_typed_ideas": sum(not idea.mistyped for idea in drawn),
        "odd_ideas": len(odd),
        "talks": len(talk),
        "shares": {
            "generated_right": _share([item.right for item in generated]),
            "well_typed_right": _share(
                [item.right for item, idea in zip(generated, drawn, strict=True) if not idea.mistyped]
            ),
            "generated_as_expected": _share([item.as_expected is True for item in generated]),
            "generated_well_formed": _share([item.well_formed for item in generated]),
            "odd_right": _share([item.right for item in odd]),
            "odd_well_formed": _share([item.well_formed for item in odd]),
            "talk_right": _share([item.right for item in talk]),
            "films_right": _share([item.colour_right and item.shape_right and item.motion_right for item in filmed]),
            "films_right_without_caption": _share([item.right_without_caption for item in filmed]),
        },
        "wrong": [
            *(asdict(item) for item in (*generated, *odd) if not item.right),
            *(asdict(item) for item in talk if not item.right),
        ],
        "films": [asdict(item) for item in filmed],
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo language model on ideas it never saw.")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="model folder (default: the shipped weights)")
    parser.add_argument("--ideas", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(options.model, ideas=options.ideas, seed=options.seed)
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
