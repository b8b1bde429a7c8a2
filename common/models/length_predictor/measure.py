"""Measures a predictor on answers it was not trained on, and the histogram that would take its place beside it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from common.models.length_predictor.answers import Answered
from common.models.length_predictor.lengths import AnswerLengths
from common.models.length_predictor.predictor import LengthPredictor
from common.models.length_predictor.quality import Quality, coarser, quality, quality_of_classes
from common.policies.language.length_prediction import LengthBuckets, LengthHistogram

COARSER = (2, 4)
"""Accuracy is told of ranges so many times as wide, too."""
_TIMED = 200


class Row(TypedDict):
    """One measurement as JSON: what on, how wide a range is, and the values of ``Quality``."""

    of: str
    granularity: int
    count: int
    exact: float
    within_one: float
    calibration_error: float | None


class Figures(TypedDict):
    """Everything measured; times in microseconds for one prompt, on one thread."""

    rows: list[Row]
    predict_us: float


def measure(
    predictor: LengthPredictor, histogram: AnswerLengths, held_out: Mapping[str, Sequence[Answered]]
) -> Figures:
    """``histogram`` has counted the answers that the predictor was trained on."""
    rows: list[Row] = []
    for kind, answers in held_out.items():
        likely = [predictor.predict(one.prompt) for one in answers]
        labels = [predictor.buckets.bucket(one.tokens) for one in answers]
        width = predictor.buckets.granularity
        rows.append(_row(kind, width, quality(likely, labels)))
        for temperature in sorted({one.temperature for one in answers}):
            chosen = [number for number, one in enumerate(answers) if one.temperature == temperature]
            part = quality([likely[number] for number in chosen], [labels[number] for number in chosen])
            rows.append(_row(f"{kind}, answers at temperature {temperature:g}", width, part))
        for times in COARSER:
            wider = quality([coarser(one, times) for one in likely], [label // times for label in labels])
            rows.append(_row(kind, width * times, wider))
        rows.append(_row(f"{kind}, by the histogram", width, histogram_quality(histogram, predictor.buckets, answers)))
    prompts = [one.prompt for answers in held_out.values() for one in answers]
    return {"rows": rows, "predict_us": _microseconds(predictor.predict, prompts)}


def histogram_quality(histogram: AnswerLengths, buckets: LengthBuckets, answers: Sequence[Answered]) -> Quality:
    """The histogram's predictions of the same answers."""
    predicted = [buckets.bucket(histogram.expect(one.prompt).low) for one in answers]
    return quality_of_classes(predicted, [buckets.bucket(one.tokens) for one in answers])


def counted(answers: Sequence[Answered], buckets: LengthBuckets) -> AnswerLengths:
    """A histogram, once these answers have ended."""
    histogram = AnswerLengths(None, LengthHistogram(buckets, unknown=0))
    for one in answers:
        histogram.ended(one.prompt, one.tokens)
    return histogram


def _row(of: str, granularity: int, measured: Quality) -> Row:
    return Row(
        of=of,
        granularity=granularity,
        count=measured.count,
        exact=measured.exact,
        within_one=measured.within_one,
        calibration_error=measured.calibration_error,
    )


def _microseconds(predict: Callable[[bytes], object], prompts: Sequence[bytes]) -> float:
    """The median over some prompts."""
    spent = []
    for prompt in prompts[:_TIMED]:
        start_s = time.perf_counter()
        predict(prompt)
        spent.append((time.perf_counter() - start_s) * 1e6)
    return statistics.median(spent)
