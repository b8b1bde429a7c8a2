"""What is asked for: mixes of resolutions, arrival patterns, and the load they put on a cluster.

Load is given in requests a second or as a fraction of *saturation*. Saturation is the number of GPUs over the mean
GPU-seconds of a request at degree 1, VAE included: the most requests a second that any schedule can carry for long, as
wider groups only cost more GPU-seconds. The text encoder has machines of its own and does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from common.policies.video.rib import Rib, VideoKind
from loadgen.arrivals import FloatArray, burst, generator, poisson, square_wave

STEPS = 30  # Open-Sora's default (section 2.1)


class Pattern(StrEnum):
    """How requests arrive."""

    POISSON = "poisson"
    BURST = "burst"
    SQUARE = "square"


@dataclass(frozen=True, slots=True)
class Mix:
    """Weights of the kinds of video, smallest resolution first."""

    name: str
    weights: tuple[float, ...]

    def shares(self) -> NDArray[np.float64]:
        weights = np.asarray(self.weights, dtype=np.float64)
        return np.asarray(weights / weights.sum(), dtype=np.float64)


MIXES = {
    mix.name: mix
    for mix in (
        Mix("even", (1, 1, 1)),
        Mix("small-heavy", (6, 3, 1)),
        Mix("large-heavy", (1, 3, 6)),
        Mix("bimodal", (1, 0, 1)),
    )
}


class UnknownMix(ValueError):
    """No mix has this name."""


class WrongMix(ValueError):
    """A mix that does not fit the profile: one weight is needed for each of its kinds of video."""


def mix_named(name: str) -> Mix:
    """A mix by name.

    Raises:
        UnknownMix: says which there are.
    """
    if name not in MIXES:
        raise UnknownMix(f"no mix is called {name!r}; there are: {', '.join(MIXES)}")
    return MIXES[name]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order they arrive. ``kind`` holds, for each, its index into ``kinds``.

    ``deadline_s`` and ``priority`` may be left empty: no request has one.
    """

    kinds: tuple[VideoKind, ...]
    kind: NDArray[np.int64]
    arrival_s: FloatArray
    steps: tuple[int, ...]
    deadline_s: tuple[float | None, ...] = ()
    priority: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_s)


def make_workload(
    kinds: Sequence[VideoKind], mix: Mix, pattern: Pattern, rate: float, count: int, seed: int, steps: int = STEPS
) -> Workload:
    """``count`` requests. A seed's requests are the same at every rate, and their kinds under every pattern.

    Raises:
        WrongMix: it does not fit the kinds.
        ValueError: the rate or count is not above zero.
    """
    _check(mix, kinds)
    match pattern:
        case Pattern.POISSON:
            arrival_s = poisson(rate, count, seed)
        case Pattern.BURST:
            arrival_s = burst(count)
        case Pattern.SQUARE:
            arrival_s = square_wave(rate, count, seed)
    kind = generator(seed, 1).choice(len(kinds), size=count, p=mix.shares())
    return Workload(tuple(kinds), kind, arrival_s, (steps,) * count)


def gpu_seconds_at_one(rib: Rib, kind: VideoKind, steps: int = STEPS) -> float:
    """What one request costs on one GPU, VAE included."""
    return steps * rib.step_s(kind, 1) + rib.decode_s(kind)


def saturation_rate(rib: Rib, kinds: Sequence[VideoKind], mix: Mix, gpus: int, steps: int = STEPS) -> float:
    """Requests a second at load 1 (see the module's head).

    Raises:
        WrongMix: the mix does not fit the kinds.
    """
    _check(mix, kinds)
    mean = sum(share * gpu_seconds_at_one(rib, kind, steps) for share, kind in zip(mix.shares(), kinds, strict=True))
    return float(gpus / mean)


def _check(mix: Mix, kinds: Sequence[VideoKind]) -> None:
    if len(mix.weights) != len(kinds):
        raise WrongMix(f"mix {mix.name} has {len(mix.weights)} weights, the profile {len(kinds)} kinds of video")
