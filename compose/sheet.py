"""A contact sheet: the frames of a video side by side in one picture."""

import math
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from compose.errors import StackError

_PAPER = (18, 20, 26)
_INK = (232, 234, 240)
_FAINT = (130, 136, 150)
_MARGIN = 28
_GAP = 10
_CAPTION = 64
_LABEL = 20
# Small frames are enlarged by a whole factor to about this width, so that their pixels stay square.
_CELL_WIDTH = 180


def write_sheet(video: Path, target: Path, title: str, columns: int = 6, most_frames: int = 24) -> None:
    """Write the frames of ``video`` (evenly chosen if there are more than ``most_frames``) as a PNG.

    Raises:
        StackError: the file holds no frame that can be read.
    """
    frames, rate = _read(video)
    chosen = [round(index * (len(frames) - 1) / max(1, most_frames - 1)) for index in range(most_frames)]
    numbers = list(range(len(frames))) if len(frames) <= most_frames else chosen
    columns = min(columns, len(numbers))
    factor = max(1, _CELL_WIDTH // frames[0].width)
    width, height = frames[0].width * factor, frames[0].height * factor
    rows = math.ceil(len(numbers) / columns)
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * width + (columns - 1) * _GAP,
            _MARGIN + _CAPTION + rows * (height + _LABEL) + (rows - 1) * _GAP + _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    facts = f"{len(frames)} frames, {frames[0].width}x{frames[0].height}, {rate:g} frames per second"
    draw.text((_MARGIN, _MARGIN - 4), _fitted(title, sheet.width - 2 * _MARGIN), _INK, ImageFont.load_default(22))
    draw.text((_MARGIN, _MARGIN + 28), facts, _FAINT, ImageFont.load_default(14))
    for place, number in enumerate(numbers):
        left = _MARGIN + place % columns * (width + _GAP)
        top = _MARGIN + _CAPTION + place // columns * (height + _LABEL + _GAP)
        sheet.paste(frames[number].resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 4), f"{number / rate:.2f} s", _FAINT, ImageFont.load_default(12))
    sheet.save(target, format="PNG", optimize=True)


def _read(video: Path) -> tuple[list[Image.Image], float]:
    """Every frame, and the frames per second."""
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_image() for frame in container.decode(stream)]
            rate = float(stream.average_rate or 1)
    except (av.FFmpegError, IndexError) as error:
        raise StackError(f"{video} holds no video that can be read: {error}") from error
    if not frames:
        raise StackError(f"{video} holds no frame")
    return frames, rate


def _fitted(text: str, width: int) -> str:
    """The text on one line, shortened where it is wider than ``width`` pixels."""
    font = ImageFont.load_default(22)
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
