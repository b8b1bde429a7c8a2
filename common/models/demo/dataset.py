"""Encoded clips in buckets of one size and length, and token-sized batches of them for the diffusion transformer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.models.demo.clips import FRAME_COUNTS, SIZES, Subject, draw, sample_clip, sample_subject
from common.models.demo.loop import generator_of
from common.models.demo.parallel import Workers
from common.models.demo.pool import to_video
from common.models.demo.precision import mixed_precision
from common.models.opensora.vae import OpenSoraVAE

_ENCODED_PIXELS = 512 * 1024


@dataclass(frozen=True)
class Bucket:
    """One format; `clips` of it are encoded, and `share` of the last training steps draw from it."""

    width: int
    height: int
    frames: int
    clips: int
    share: float

    @property
    def tokens(self) -> int:
        """Tokens of one clip: latents are 8x8 pixels by 4 frames, patches 2x2 latents."""
        return (self.width // 16) * (self.height // 16) * (self.frames // 4)

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


# Many clips of the cheapest format: with 1,500 of them the model learned them by heart, and colour and shape held for
# new captions, but left and right did not. The larger formats have what there is time to encode.
_CLIPS: dict[int, tuple[int, int]] = {
    64 * 64: (12000, 4000),
    96 * 64: (2400, 900),
    128 * 128: (600, 400),
}
_SHARES: dict[int, tuple[float, float]] = {
    64 * 64: (0.15, 0.15),
    96 * 64: (0.09, 0.09),
    128 * 128: (0.12, 0.22),
}
BUCKETS: tuple[Bucket, ...] = tuple(
    Bucket(width, height, frames, _CLIPS[width * height][index], _SHARES[width * height][index])
    for width, height in SIZES
    for index, frames in enumerate(FRAME_COUNTS)
)


@dataclass(frozen=True)
class EncodedBucket:
    """latents: float16 [N, C, t, h, w], not yet normalised; subjects: what each clip shows."""

    bucket: Bucket
    latents: Tensor
    subjects: tuple[Subject, ...]


@torch.no_grad()
def encode_buckets(vae: OpenSoraVAE, folder: Path, share: float, seed: int, workers: Workers) -> list[EncodedBucket]:
    """Draw and encode every bucket's clips, each worker its part; parts that lie in `folder` are read instead.

    `vae` must have shift 0 and scale 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = [(index, bucket, part) for index, bucket in enumerate(BUCKETS) for part in _parts(bucket, share)]
    for index, bucket, part in plan[workers.rank :: workers.count]:
        path = _path(folder, bucket, part)
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(
                _encode(vae, bucket, _subjects(seed, index, part), generator_of(seed, index, part[0], 1)), partial
            )
            partial.replace(path)
    workers.wait()
    return [_gather(folder, index, bucket, share, seed) for index, bucket in enumerate(BUCKETS)]


def _parts(bucket: Bucket, share: float) -> list[tuple[int, int]]:
    """(number, clips) of the parts that a bucket is encoded in."""
    count = max(8, round(bucket.clips * share))
    at_once = max(1, _ENCODED_PIXELS // (bucket.width * bucket.height * bucket.frames))
    return [(number, min(at_once, count - start)) for number, start in enumerate(range(0, count, at_once))]


def _path(folder: Path, bucket: Bucket, part: tuple[int, int]) -> Path:
    return folder / f"{bucket.name}-{part[0]}-{part[1]}.pt"


def _subjects(seed: int, index: int, part: tuple[int, int]) -> list[Subject]:
    rng = generator_of(seed, index, part[0], 0)
    return [sample_subject(rng) for _ in range(part[1])]


def _gather(folder: Path, index: int, bucket: Bucket, share: float, seed: int) -> EncodedBucket:
    parts = _parts(bucket, share)
    latents = torch.cat([torch.load(_path(folder, bucket, part), weights_only=True) for part in parts])
    return EncodedBucket(bucket, latents, tuple(subject for part in parts for subject in _subjects(seed, index, part)))


def _encode(vae: OpenSoraVAE, bucket: Bucket, subjects: list[Subject], rng: np.random.Generator) -> Tensor:
    clips = [draw(sample_clip(rng, subject, bucket.width, bucket.height, bucket.frames)) for subject in subjects]
    device = vae.shift.device
    with mixed_precision(device):
        return vae.encode(to_video(np.stack(clips)).to(device)).to("cpu", torch.float16)


def latent_statistics(encoded: list[EncodedBucket]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) [C] of the latents; every bucket weighs the same."""
    means, squares = [], []
    for bucket in encoded:
        values = bucket.latents.float().transpose(0, 1).flatten(1)
        means.append(values.mean(dim=1))
        squares.append(values.pow(2).mean(dim=1))
    mean = torch.stack(means).mean(dim=0)
    return mean, (torch.stack(squares).mean(dim=0) - mean.pow(2)).sqrt()


class LatentBatches:
    """Batches of about `tokens` tokens.

    The first steps draw every clip equally often, so mostly small, short ones; the last ones draw formats by share.
    """

    def __init__(self, encoded: list[EncodedBucket], tokens: int) -> None:
        self._encoded = encoded
        self._tokens = tokens
        self._mean, self._deviation = (value[:, None, None, None] for value in latent_statistics(encoded))
        late = np.asarray([item.bucket.share for item in encoded])
        even = np.asarray([len(item.subjects) * item.bucket.tokens for item in encoded])
        self._late, self._early = late / late.sum(), even / even.sum()

    def draw(self, rng: np.random.Generator, progress: float) -> tuple[Bucket, Tensor, list[Subject]]:
        """(bucket, normalised latents float32 [B, C, t, h, w], their subjects)."""
        blend = 0.9 * max(0.0, (progress - 0.4) / 0.6)
        index = int(rng.choice(len(self._encoded), p=(1 - blend) * self._early + blend * self._late))
        chosen = self._encoded[index]
        count = min(max(3, self._tokens // chosen.bucket.tokens), len(chosen.subjects))
        rows = rng.choice(len(chosen.subjects), size=count, replace=False)
        latents = (chosen.latents[torch.from_numpy(rows)].float() - self._mean) / self._deviation
        return chosen.bucket, latents, [chosen.subjects[row] for row in rows]
