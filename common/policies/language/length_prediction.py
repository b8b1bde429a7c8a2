"""How long an answer will be (TetriInfer, section 3.3.2): a range out of ranges of equal width.

The paper's predictor is a classifier: class i means i * granularity tokens or more, and fewer than (i + 1) *
granularity. Where no predictor has been trained for a model, ``LengthHistogram`` takes its place: it counts the answers
that were given to prompts of the same class, and says in ``source`` that it is what spoke.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthRange:
    """The answer will have ``low`` tokens or more, and fewer than ``high``. ``source``: who says so."""

    low: int
    high: int
    source: str

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2


@dataclass(frozen=True, slots=True)
class LengthBuckets:
    """``buckets`` ranges of ``granularity`` tokens each; the last one is open at its upper end.

    Raises:
        ValueError: there would be none.
    """

    granularity: int = 200
    buckets: int = 11

    def __post_init__(self) -> None:
        if min(self.granularity, self.buckets) < 1:
            raise ValueError("granularity and the number of buckets are at least 1")

    def bucket(self, tokens: int) -> int:
        """The class of an answer of so many tokens."""
        return min(tokens // self.granularity, self.buckets - 1)

    def range(self, bucket: int, source: str) -> LengthRange:
        """What a class means; one outside counts as the nearest."""
        inside = min(max(bucket, 0), self.buckets - 1)
        return LengthRange(inside * self.granularity, (inside + 1) * self.granularity, source)


def prompt_class(prompt_tokens: int) -> int:
    """Prompts whose lengths are within the same power of two are of one class: all that is known without a model."""
    return prompt_tokens.bit_length()


class LengthHistogram:
    """Counts answers by class of prompt, and predicts the bucket in which the median of its class lies.

    Before it has seen ``least`` answers of a class, it goes by all classes; before it has seen any at all, by
    ``unknown`` tokens.
    """

    def __init__(self, buckets: LengthBuckets, unknown: int, least: int = 8) -> None:
        self._buckets = buckets
        self._unknown = unknown
        self._least = least
        self._of_class: defaultdict[Hashable, list[int]] = defaultdict(lambda: [0] * buckets.buckets)
        self._all = [0] * buckets.buckets

    def observe(self, of_class: Hashable, answer_tokens: int) -> None:
        """An answer has ended."""
        bucket = self._buckets.bucket(answer_tokens)
        self._of_class[of_class][bucket] += 1
        self._all[bucket] += 1

    def predict(self, of_class: Hashable) -> LengthRange:
        """What the answers so far suggest."""
        counts = self._of_class.get(of_class, [])  # get: asking makes no class
        if sum(counts) >= self._least:
            return self._buckets.range(_median(counts), f"histogram of {sum(counts)} answers to prompts of this class")
        if any(self._all):
            return self._buckets.range(_median(self._all), f"histogram of all {sum(self._all)} answers")
        return self._buckets.range(self._buckets.bucket(self._unknown), "histogram, still empty")


def _median(counts: list[int]) -> int:
    """The bucket of the middle answer; of two middle ones, the lower's."""
    left = (sum(counts) + 1) // 2
    for bucket, count in enumerate(counts):
        left -= count
        if left <= 0:
            return bucket
    raise ValueError("no answers are counted")
