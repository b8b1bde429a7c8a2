"""The drawing on the page: a row for each slot, a box for each piece of work. Pure text in, SVG out."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compose.timeline.story import Piece, Story, bounds_s, pieces

_LABEL_WIDTH = 110
_ROW_HEIGHT = 46
_BAR_HEIGHT = 30
_AXIS_HEIGHT = 34
_NARROWEST_LABELLED = 18
# The page is as wide as a screen, or wider where steps would become too thin to be told apart.
_NARROWEST_CHART, _WIDEST_CHART = 1000, 24000
_NARROWEST_PAGE = 760
_STEP_WIDTH = 6
_TICK_DISTANCE = 125
# By the golden angle, so that neighbours in time never look alike.
_HUE_STEP = 137.508


@dataclass(frozen=True)
class _Scale:
    """Seconds since the first piece of work, as positions on the page."""

    origin_s: float
    length_s: float
    width: float

    def x(self, moment_s: float) -> float:
        return _LABEL_WIDTH + (moment_s - self.origin_s) / self.length_s * self.width


def chart(stories: Sequence[Story]) -> str:
    """The drawing, or a line that says that there is nothing to draw."""
    found = pieces(stories)
    if not found:
        return "<p>No work was recorded.</p>"
    start_s, end_s = bounds_s(found)
    length_s = max(end_s - start_s, 1e-6)
    scale = _Scale(start_s, length_s, _width(found, length_s))
    rows = sorted({row for piece in found for row in piece.rows})
    height = len(rows) * _ROW_HEIGHT + _AXIS_HEIGHT
    width = _LABEL_WIDTH + scale.width + 20
    many = len(stories) > 1
    least = width if scale.width > _NARROWEST_CHART else _NARROWEST_PAGE
    parts = [
        f'<svg class="{"videos" if many else "phases"}" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'style="min-width: {least:.0f}px" '
        f'aria-label="What each slot did, over {length_s:.2f} seconds">'
    ]
    parts += _axis(scale, len(rows) * _ROW_HEIGHT)
    for index, row in enumerate(rows):
        middle = index * _ROW_HEIGHT + _ROW_HEIGHT / 2
        parts.append(
            f'<line class="row" x1="{_LABEL_WIDTH}" x2="{_LABEL_WIDTH + scale.width:.0f}" y1="{middle}" y2="{middle}"/>'
        )
        parts.append(f'<text class="name" x="0" y="{middle + 5}">{escape(row.name)}</text>')
        parts += [_box(piece, scale, middle, stories if many else ()) for piece in found if row in piece.rows]
    return "\n".join([*parts, "</svg>"])


def hue(video: int) -> float:
    """The colour of a video among many, in degrees."""
    return video * _HUE_STEP % 360


def _width(found: Sequence[Piece], length_s: float) -> float:
    steps = [piece.took_s for piece in found if piece.span.phase == "step"]
    if not steps:
        return _NARROWEST_CHART
    wanted = length_s / max(statistics.median(steps), 1e-6) * _STEP_WIDTH
    return min(max(wanted, _NARROWEST_CHART), _WIDEST_CHART)


def _box(piece: Piece, scale: _Scale, middle: float, stories: Sequence[Story]) -> str:
    """One piece of work; with many ``stories`` it has its video's colour and names it."""
    span = piece.span
    left, right = scale.x(span.started_at_s), scale.x(span.ended_at_s)
    width = max(right - left, 1.5)
    wide = span.degree_of_parallelism > 1
    classes = f"{escape(span.phase)}{' odd' if (span.step or 0) % 2 else ''}{' shared' if wide else ''}"
    label = span.phase if span.step is None else f"{span.step}×{span.degree_of_parallelism}" if wide else f"{span.step}"
    fits = width >= _NARROWEST_LABELLED * max(1.0, len(label) / 2)
    text = f'<text x="{left + width / 2:.2f}" y="{middle + 4:.2f}">{escape(label)}</text>' if fits else ""
    colour = f' style="--hue: {hue(piece.video):.0f}"' if stories else ""
    # A hair's breadth between neighbours, so that equal steps read as separate ones.
    return (
        f'<g class="span {classes}"{colour}><title>{escape(_hint(piece, scale, stories))}</title>'
        f'<rect x="{left:.2f}" y="{middle - _BAR_HEIGHT / 2:.2f}" width="{max(width - 0.8, 1):.2f}" '
        f'height="{_BAR_HEIGHT}" rx="{min(4.0, width / 4):.2f}"/>{text}</g>'
    )


def _hint(piece: Piece, scale: _Scale, stories: Sequence[Story]) -> str:
    span = piece.span
    where = piece.together or f"on {span.instance}"
    start_s = span.started_at_s - scale.origin_s
    lines = [f"{piece.what} {where}", f"from {start_s:.3f} s, took {piece.took_s:.3f} s"]
    if stories:
        story = stories[piece.video]
        lines += [story.prompt, f"{story.timeline.job_id} {story.detail}".strip()]
    return "\n".join(lines)


def _axis(scale: _Scale, bottom: int) -> list[str]:
    step_s = _tick_s(scale.length_s * _TICK_DISTANCE / scale.width)
    decimals = max(0, -math.floor(math.log10(step_s)))
    parts = []
    for index in range(math.floor(scale.length_s / step_s + 1e-9) + 1):
        x = scale.x(scale.origin_s + index * step_s)
        parts.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.2f}" y="{bottom + 22}">{index * step_s:.{decimals}f} s</text>')
    return parts


def _tick_s(rough_s: float) -> float:
    """The next round distance between ticks: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough_s))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough_s * (1 - 1e-9))
