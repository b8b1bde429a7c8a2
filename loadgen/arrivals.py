"""When requests arrive. Every pattern is a pure function of its numbers and a seed.

One seed gives one sequence of draws, whatever the rate: at twice the rate the same requests come twice as fast, so
that points of a sweep differ by the load alone.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def generator(seed: int, stream: int) -> np.random.Generator:
    """The random numbers of one purpose: streams of one seed do not touch each other."""
    return np.random.default_rng([seed, stream])


def poisson(rate: float, count: int, seed: int) -> FloatArray:
    """``count`` arrival times, in seconds, of a Poisson process of ``rate`` requests a second."""
    _check(rate, count)
    return np.cumsum(generator(seed, 0).exponential(1.0, count)) / rate


def burst(count: int) -> FloatArray:
    """Everything at once, at time zero."""
    _check(1.0, count)
    return np.zeros(count)


def square_wave(
    rate: float, count: int, seed: int, *, period_s: float = 240.0, high_share: float = 0.25, ratio: float = 5.0
) -> FloatArray:
    """A Poisson process whose rate jumps: ``high_share`` of every period at ``ratio`` times the rate of the rest.

    The mean over a period is ``rate``; every period begins with its high part. The unit-rate process is stretched by
    the inverse of the summed rate, which keeps it exact.
    """
    _check(rate, count)
    if period_s <= 0 or not 0 < high_share < 1 or ratio < 1:
        raise ValueError("a square wave needs a period above 0 s, a high share within 0 and 1, a ratio of 1 or more")
    low = rate / (high_share * ratio + 1 - high_share)
    high_s = high_share * period_s
    per_period, in_high = rate * period_s, low * ratio * high_s
    work = np.cumsum(generator(seed, 0).exponential(1.0, count))
    whole, rest = np.divmod(work, per_period)
    within = np.where(rest < in_high, rest / (low * ratio), high_s + (rest - in_high) / low)
    return np.asarray(whole * period_s + within, dtype=np.float64)


def _check(rate: float, count: int) -> None:
    if rate <= 0:
        raise ValueError(f"a rate of {rate} requests/s brings none: give one above 0")
    if count < 1:
        raise ValueError(f"{count} requests are none: give 1 or more")
