"""The predictor's model card and the figures that it quotes."""

import json
from pathlib import Path
from typing import TypedDict

from common.models.length_predictor.measure import Figures, Row
from common.models.length_predictor.predictor import WEIGHTS, LengthPredictor

CARD, FIGURES = "MODEL_CARD.md", "figures.json"

_TEXT = """# Length predictor of {model}

Reads a prompt's tokens and gives a probability to each of {buckets} ranges of {granularity} tokens (the last one is
open) in which the length of the model's answer may lie; the token that ends an answer counts. It has the part that
OPT-125M has in TetriInfer (section 3.3.2), and is a far smaller network: embeddings of the last {window} tokens, two
convolutions, pooling, one hidden layer; {parameters:,} parameters, {kilobytes:.0f} kB in half precision. One prompt
takes {predict_us:.0f} microseconds (median) on one thread of the processor it was trained on.

## How it was made

`python -m common.models.length_predictor.train`: seed {seed}. The main model itself answered {training:,} prompts,
greedily and at temperature 1, with at most {most_tokens} tokens; with those held out there were {answers:,} answers.
That took {answer_s:.0f} s of one CPU core, {epochs} epochs of cross-entropy {train_s:.0f} s. Logits are divided by a
temperature of {temperature:.2f}, set on {tuning:,} prompts apart.

## Quality

On prompts that it was not trained on. "Drawn": ideas in templates and combinations of words that training keeps out,
and talk whose letters it never has. "Written by hand": odd ideas and small talk, none of them drawn. "Within one": the
range beside counts too. Calibration error: the expected one, over ten bins of the probability of the likeliest range.
The histogram, which takes the predictor's place where there is none, counted the same training answers by the length of
their prompts.

| measured on | tokens per range | answers | right | within one | calibration error |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}

At temperature 1 the same prompt has answers of several lengths, so that no predictor is always right.

## Limits

It knows neither a request's temperature nor its `max_tokens`, and is good for this main model alone. License:
Apache-2.0.
"""


class Facts(TypedDict):
    """How the predictor was trained; seconds are one core's."""

    model: str
    seed: int
    training: int
    tuning: int
    answers: int
    most_tokens: int
    epochs: int
    answer_s: float
    train_s: float


def write_card(model_folder: Path, predictor: LengthPredictor, figures: Figures, facts: Facts) -> None:
    """Write both beside the predictor's weights, which are there already."""
    folder = LengthPredictor.folder(model_folder)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = _TEXT.format(
        buckets=predictor.buckets.buckets,
        granularity=predictor.buckets.granularity,
        window=predictor.window,
        parameters=predictor.parameters,
        kilobytes=(folder / WEIGHTS).stat().st_size / 1e3,
        predict_us=figures["predict_us"],
        temperature=predictor.temperature,
        rows="\n".join(_line(row) for row in figures["rows"]),
        **facts,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _line(row: Row) -> str:
    error = "" if row["calibration_error"] is None else f"{row['calibration_error']:.3f}"
    shares = f"{row['exact']:.1%} | {row['within_one']:.1%}"
    return f"| {row['of']} | {row['granularity']} | {row['count']:,} | {shares} | {error} |"
