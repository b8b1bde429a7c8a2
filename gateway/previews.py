"""Still pictures of a finished video: a thumbnail, and a spritesheet of frames spread evenly over it.

Decoding runs in a thread of its own, one video at a time, so that the event loop and other requests go on.
"""

import asyncio
import io
import math
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Literal

import av
from av.container import InputContainer
from PIL import Image

Variant = Literal["thumbnail", "spritesheet"]

_THUMBNAIL_SIDE = 512
_TILE_SIDE = 256
_TILES = 16
_QUALITY = 85
_IN_MEMORY_BYTES = 16 * 1024 * 1024


class PreviewFailed(Exception):
    """The file cannot be decoded."""


class Previews:
    """Makes previews as WebP and keeps the latest ``capacity`` of them. ``close`` it at the end."""

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._made: OrderedDict[tuple[str, Variant], bytes] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="previews")

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def picture(self, variant: Variant, sha256: str, frames: int, file: AsyncIterator[bytes]) -> bytes:
        """The preview of the video with this ``sha256`` and number of ``frames``; ``file`` is read only if needed.

        Raises:
            PreviewFailed: not a video that can be decoded.
        """
        key = (sha256, variant)
        async with self._one_at_a_time:
            picture = self._made.get(key)
            if picture is None:
                spool = await _spooled(file)
                # The thread closes the file: it goes on with it even where whoever asked is cancelled meanwhile.
                rendering = asyncio.get_running_loop().run_in_executor(self._thread, _render, variant, spool, frames)
                picture = await rendering
                self._made[key] = picture
                if len(self._made) > self._capacity:
                    self._made.popitem(last=False)
        self._made.move_to_end(key)
        return picture


async def _spooled(file: AsyncIterator[bytes]) -> IO[bytes]:
    """The whole file, in memory as long as it is small."""
    spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by whoever reads it
    try:
        async for chunk in file:
            spool.write(chunk)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool


def _render(variant: Variant, file: IO[bytes], frames: int) -> bytes:
    with file:
        picture = _picture(variant, file, frames)
    packed = io.BytesIO()
    picture.save(packed, format="WEBP", quality=_QUALITY)
    return packed.getvalue()


def _picture(variant: Variant, file: IO[bytes], frames: int) -> Image.Image:
    try:
        with av.open(file, mode="r", format="mp4") as container:
            count = container.streams.video[0].frames or frames
            if variant == "thumbnail":
                return _chosen(container, [count // 2], _THUMBNAIL_SIDE)[0]
            tiles = min(_TILES, count)
            return _sheet(_chosen(container, [index * count // tiles for index in range(tiles)], _TILE_SIDE))
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise PreviewFailed(str(error)) from error


def _chosen(container: InputContainer, indices: Sequence[int], side: int) -> list[Image.Image]:
    """The frames with these indices, in order, shrunk to at most ``side`` pixels either way."""
    wanted = set(indices)
    pictures: list[Image.Image] = []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
            picture.thumbnail((side, side))
            pictures.append(picture)
        if index >= indices[-1]:
            break
    return pictures


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
