"""How good predictions are: how often right, how often nearly, and whether their probabilities are true."""

from collections.abc import Sequence
from dataclasses import dataclass

_BINS = 10


@dataclass(frozen=True, slots=True)
class Quality:
    """Of ``count`` predictions: the shares that were right and that were at most one range off; see
    ``calibration_error``. None where what predicts gives no probabilities."""

    count: int
    exact: float
    within_one: float
    calibration_error: float | None = None


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = _BINS) -> float:
    """The expected calibration error (Naeini et al., 2015), 0 to 1.

    Predictions are binned by the probability given to the likeliest class, in ``bins`` equal steps. In each bin the
    mean probability is compared with the share that was right; the differences' mean, weighted by the bins' counts.

    Raises:
        ValueError: there are none, or not as many of one as of the other.
    """
    if not confidences:
        raise ValueError("no predictions")
    sums = [0.0] * bins
    for confidence, correct in zip(confidences, right, strict=True):
        sums[min(int(confidence * bins), bins - 1)] += confidence - correct
    return sum(abs(difference) for difference in sums) / len(confidences)


def quality(probabilities: Sequence[Sequence[float]], labels: Sequence[int]) -> Quality:
    """Judge probabilities by class against the classes that came. Raises: ValueError: see ``calibration_error``."""
    likeliest = [max(range(len(one)), key=one.__getitem__) for one in probabilities]
    plain = quality_of_classes(likeliest, labels)
    error = calibration_error(
        [max(one) for one in probabilities], [a == b for a, b in zip(likeliest, labels, strict=True)]
    )
    return Quality(plain.count, plain.exact, plain.within_one, error)


def quality_of_classes(predicted: Sequence[int], labels: Sequence[int]) -> Quality:
    """Judge predictions without probabilities. Raises: ValueError: there are none, or unequally many."""
    if not labels:
        raise ValueError("no predictions")
    off = [abs(a - b) for a, b in zip(predicted, labels, strict=True)]
    return Quality(len(off), off.count(0) / len(off), sum(one <= 1 for one in off) / len(off))


def coarser(probabilities: Sequence[float], times: int) -> list[float]:
    """The probabilities of ranges ``times`` as wide."""
    return [sum(probabilities[start : start + times]) for start in range(0, len(probabilities), times)]
