"""What has been seen corrects what was predicted (ours).

MemServe's cost model is fitted once, offline (arXiv 2406.17565, section 5.3). What it does not know, other work on the
machine above all, shows in every prefill and every pull that ends.
"""

import math
from dataclasses import dataclass

# What was seen before counts half as much after this many further observations.
_HALF = 16
_KEPT = 0.5 ** (1 / _HALF)
_LEAST, _MOST = 0.25, 4.0
_FORGETS_S = 60.0


@dataclass(slots=True)
class SeenRatio:
    """Seconds seen over seconds predicted, of the last observations; 1 before there are any.

    The sums are compared and not each pair: of prefills that share passes one seems to take all of their time and the
    others none, while their sum is right. Clipped, so that one stall does not turn every decision around.
    """

    seen_s: float = 0.0
    predicted_s: float = 0.0

    def saw(self, predicted_s: float, seen_s: float) -> None:
        """One more, with what was predicted for it before any correction."""
        self.seen_s = self.seen_s * _KEPT + seen_s
        self.predicted_s = self.predicted_s * _KEPT + predicted_s

    @property
    def factor(self) -> float:
        """By which to multiply a prediction."""
        if self.predicted_s <= 0:
            return 1.0
        return min(_MOST, max(_LEAST, self.seen_s / self.predicted_s))


@dataclass(slots=True)
class SeenDelay:
    """By how many seconds things took longer than predicted, whatever their size; 0 before anything is seen.

    A pull waits for a step to end at either instance: that goes by what they compute, not by its bytes. Half of what is
    known is forgotten in a minute, or after one slow pull none would be tried again.
    """

    mean_s: float = 0.0
    weight: float = 0.0
    at_s: float = 0.0

    def saw(self, predicted_s: float, seen_s: float, now_s: float) -> None:
        """One more."""
        self.mean_s, self.at_s = self.delay_s(now_s), now_s
        self.weight = self.weight * _KEPT + 1
        self.mean_s += (max(0.0, seen_s - predicted_s) - self.mean_s) / self.weight

    def delay_s(self, now_s: float) -> float:
        """To add to a prediction."""
        return self.mean_s * math.exp2((self.at_s - now_s) / _FORGETS_S)
