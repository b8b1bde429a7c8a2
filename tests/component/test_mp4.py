"""The file writer: what a video file must be, whatever the machine did before."""

import ctypes
import io
import sys

import av
import numpy as np
import pytest

from common.models.mp4 import Frames, Mp4Encoder

_M_PERTURB = -6


def patches(width: int, height: int, frames: int, seed: int) -> Frames:
    """Patches of 8x8 pixels that change with every frame: nothing for an encoder to predict."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


def encoded(frames: Frames) -> bytes:
    file = Mp4Encoder(frames.shape[2], frames.shape[1], fps=8)
    file.add(frames)
    return file.finish()


def test_a_file_holds_every_frame_in_its_size() -> None:
    frames = patches(64, 48, 13, seed=1)
    with av.open(io.BytesIO(encoded(frames))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.asarray(decoded).shape == frames.shape
    assert np.abs(np.asarray(decoded).astype(int) - frames).mean() < 16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (96, 64)])
def test_the_same_frames_give_the_same_bytes_whatever_memory_held_before(size: tuple[int, int]) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for seed in range(4):
        frames = patches(*size, 13, seed)
        files = set()
        try:
            for filling in (0, 1, 0x55, 0xAA, 0xFF):
                mallopt(_M_PERTURB, filling)  # fresh memory is filled with this byte
                files.add(encoded(frames))
        finally:
            mallopt(_M_PERTURB, 0)
        assert len(files) == 1
