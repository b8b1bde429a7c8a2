"""Video files: H.264 in MP4, written frame by frame. The same frames give the same bytes."""

import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


class Mp4Encoder:
    """Takes frames as they are decoded; ``finish`` returns the file.

    One x264 thread: frame threads would make the bytes depend on the machine.

    Args:
        width, height: in pixels, even.
        fps: frames per second.
    """

    def __init__(self, width: int, height: int, fps: int) -> None:
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        stream = self._container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without the macroblock tree: with AVX-512 it reads memory that was never written, so that the same frames gave
        # different bytes.
        stream.options = {"crf": "14", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._count = 0

    def add(self, frames: Frames) -> None:
        """Append frames [n, height, width, 3] of uint8 RGB."""
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = self._count
            self._count += 1
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Close the file and return its bytes."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()

    def abandon(self) -> None:
        """Free the codec without finishing the file."""
        self._container.close()
