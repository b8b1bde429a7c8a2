"""Drawn clips kept in memory for the training of the VAE, and crops out of them around the object."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.demo.clips import FRAME_COUNTS, SIZES, ClipSpec, Frames, draw, pose_at, sample_clip, sample_subject

_BRIGHTEST_BACKGROUND = 70
_OBJECT_WEIGHT = 4.0


@dataclass(frozen=True)
class DrawnClip:
    spec: ClipSpec
    frames: Frames


class ClipPool:
    """`count` clips of all sizes and lengths, drawn once."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.clips: list[DrawnClip] = []
        for index in range(count):
            width, height = SIZES[index % len(SIZES)]
            frames = FRAME_COUNTS[int(rng.integers(len(FRAME_COUNTS)))]
            spec = sample_clip(rng, sample_subject(rng), width, height, frames)
            self.clips.append(DrawnClip(spec, draw(spec)))

    def crops(self, rng: np.random.Generator, count: int, frames: int, size: int) -> Tensor:
        """Random pieces as float32 [count, 3, frames, size, size] in -1..1, most of them on the object."""
        out = np.empty((count, frames, size, size, 3), dtype=np.uint8)
        for row in range(count):
            clip = self._clip_at_least(rng, size)
            start = int(rng.integers(clip.spec.frames - frames + 1))
            top, left = self._corner(rng, clip.spec, start + frames // 2, size)
            out[row] = clip.frames[start : start + frames, top : top + size, left : left + size]
        return to_video(out)

    def _clip_at_least(self, rng: np.random.Generator, size: int) -> DrawnClip:
        while True:
            clip = self.clips[int(rng.integers(len(self.clips)))]
            if min(clip.spec.width, clip.spec.height) >= size:
                return clip

    @staticmethod
    def _corner(rng: np.random.Generator, spec: ClipSpec, frame: int, size: int) -> tuple[int, int]:
        if rng.random() < 0.1:
            return int(rng.integers(spec.height - size + 1)), int(rng.integers(spec.width - size + 1))
        pose = pose_at(spec, min(frame, spec.frames - 1))
        reach = 0.4 * size
        top = round(pose.y - size / 2 + rng.uniform(-reach, reach))
        left = round(pose.x - size / 2 + rng.uniform(-reach, reach))
        return min(max(top, 0), spec.height - size), min(max(left, 0), spec.width - size)


def to_video(frames: Frames) -> Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> Frames:
    """float [B, 3, T, H, W] in -1..1 to uint8 [B, T, H, W, 3]."""
    pixels = video.detach().float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    array: Frames = pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
    return array


def pixel_weights(images: Tensor) -> Tensor:
    """Weight of every pixel of [N, 3, H, W] in the reconstruction loss: the object and its rim count more."""
    bright = images.amax(dim=1, keepdim=True) > _BRIGHTEST_BACKGROUND / 127.5 - 1
    near = F.max_pool2d(bright.float(), kernel_size=7, stride=1, padding=3)
    return 1 + (_OBJECT_WEIGHT - 1) * near
