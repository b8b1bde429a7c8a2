"""What things take, in virtual seconds: the profile (RIB), the price of changing a lease, and noise by seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.policies.video.rib import Rib, VideoKind
from loadgen.arrivals import generator


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds added where a lease changes. The defaults are the paper's figures: "below 1 ms" each."""

    regroup_s: float = 0.001  # forming a group of two or more, at a start and at every change
    broadcast_s: float = 0.001  # latent and embeddings to those who join a running group
    park_s: float = 0.001  # latent to the cache store, the slots being held meanwhile
    resume_s: float = 0.001  # latent from the cache store, before a parked video's next step

    @staticmethod
    def none() -> "Overheads":
        return Overheads(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Noise:
    """Multiplies the times of each video by its own factors, of mean one and the given relative spread.

    A video's factors depend on the seed and its place in the workload alone, so that every policy meets the same ones.
    """

    spread: float = 0.0
    seed: int = 0

    def factors(self, count: int) -> NDArray[np.float64]:
        """For each of ``count`` videos one factor for its steps and one for its decoding."""
        if self.spread == 0.0:
            return np.ones((count, 2))
        sigma = np.sqrt(np.log1p(self.spread**2))
        return generator(self.seed, 2).lognormal(-(sigma**2) / 2, sigma, (count, 2))


class CostModel:
    """Times by kind and degree, what a changed lease costs, and how the videos' own times differ."""

    def __init__(self, rib: Rib, overheads: Overheads | None = None, noise: Noise | None = None) -> None:
        self.rib = rib
        self.overheads = overheads or Overheads()
        self.noise = noise or Noise()

    def step_s(self, kind: VideoKind, degree: int) -> float:
        return self.rib.step_s(kind, degree)

    def request_s(self, kind: VideoKind, steps: int, degree: int) -> float:
        """Denoising at one degree and decoding, without any waiting: the "execution time" of DDiT's algorithm 1."""
        return steps * self.step_s(kind, degree) + self.rib.decode_s(kind)
