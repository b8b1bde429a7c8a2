"""The drawings: lines over load, distributions, bars, and what every slot did when. Each is one SVG element as text.

Colours are classes; the page's style sheet gives them for light and dark.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from loadgen.report.scales import Scale, label, log_range

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 46


@dataclass(frozen=True, slots=True)
class Line:
    """One policy's points (x, y) with the ends of their confidence intervals (low, high), empty where unknown."""

    policy: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """Lines with a logarithmic y axis. What leaves the frame at the top is cut off."""
    xs = [x for line in lines for x, _ in line.points]
    low, high = log_range([y for line in lines for _, y in line.points])
    ends = log_range(xs, 3.0) if log_x else (min(xs), max(xs))
    x_scale = Scale(*ends, LEFT, WIDTH - RIGHT, log_x)
    y_scale = Scale(low, high, HEIGHT - BOTTOM, TOP, log=True)
    parts = [_frame(title, x_scale, y_scale, x_label, y_label)]
    for line in sorted(lines, key=lambda line: line.policy in ("ddit", "elastic")):
        parts.append(_line(line, x_scale, y_scale))
    return _svg(parts, title)


def cdf_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Share of requests (y, in per cent) done within so many seconds (x, logarithmic)."""
    low, high = log_range([x for line in lines for x, _ in line.points], 2.5)
    x_scale = Scale(low, high, LEFT, WIDTH - RIGHT, log=True)
    y_scale = Scale(0, 100, HEIGHT - BOTTOM, TOP)
    parts = [_frame(title, x_scale, y_scale, x_label, "requests done (%)")]
    for line in sorted(lines, key=lambda line: line.policy in ("ddit", "elastic")):
        inside = [point for point in line.points if low <= point[0] <= high]
        parts.append(_line(Line(line.policy, inside), x_scale, y_scale, dots=False))
    return _svg(parts, title)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], x_label: str, mark: float | None = None) -> str:
    """Horizontal bars from zero, with their values; ``mark`` draws a line across (a paper's figure, or 1)."""
    row, left, right = 24, 150, 60
    height = TOP + row * len(bars) + BOTTOM
    most = max([value for _, value in bars] + [mark or 0.0]) * 1.05
    scale = Scale(0, most, left, WIDTH - right)
    parts = [_title(title)]
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{label(tick)}</text>'
        )
    for number, (name, value) in enumerate(bars):
        y = TOP + number * row
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        width = scale(value) - left
        place = f'x="{left}" y="{y + 4}" width="{width:.1f}" height="{row - 8}"'
        parts.append(f'<rect class="bar {policy_class(name)}" {place} rx="2"/>')
        parts.append(f'<text class="tick" x="{left + width + 6:.1f}" y="{y + 16}">{value:.2f}</text>')
    if mark is not None:
        x = scale(mark)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    middle = (left + WIDTH - right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg(parts, title, height=height)


def slot_chart(timeline: Mapping[str, Any], classes: Sequence[str]) -> str:
    """One row a slot. Full colour: denoising; dark: decoding; pale: held but idle; the number is the group's size."""
    width, row, left = 960, 22, 58
    spans = timeline["spans"]
    slots = timeline["gpus"]
    height = TOP + row * slots + BOTTOM
    start_s, end_s = timeline["start_s"], timeline["end_s"]
    scale = Scale(start_s, end_s, left, width - RIGHT)
    bottom = height - BOTTOM
    parts = [_title(timeline["policy"])]
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label(tick)}</text>')
    for slot in range(slots):
        y = TOP + slot * row + row / 2 + 4
        parts.append(f'<text class="tick" x="{left - 8}" y="{y}" text-anchor="end">{slot}</text>')
    # Held spans first: what was done during them is drawn over them.
    for slot, began_s, ended_s, video, kind, what, degree in sorted(spans, key=lambda span: span[5] != "held"):
        x, end = scale.clipped(began_s), scale.clipped(ended_s)
        y = TOP + slot * row + 2
        hint = f"video {video}, {classes[kind]}: {what}" + (f" on {degree} GPUs" if what == "denoise" else "")
        parts.append(
            f'<rect class="span {what} kind{kind}" x="{x:.1f}" y="{y}" width="{max(end - x - 0.6, 0.4):.1f}" '
            f'height="{row - 4}" rx="2"><title>{escape(hint)}, {began_s:.2f} to {ended_s:.2f} s</title></rect>'
        )
        if what == "denoise" and end - x > 14:
            parts.append(f'<text class="degree" x="{x + 4:.1f}" y="{y + row - 9}">{degree}</text>')
    parts.append(f'<text class="axis" x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">time (s)</text>')
    parts.append(_y_label("slot (GPU)", (TOP + bottom) / 2))
    return _svg(parts, f"slots under {timeline['policy']}", width=width, height=height)


def policy_class(policy: str) -> str:
    """The style class of a policy: "sdop:1" is "p-sdop-1"."""
    return "p-" + re.sub("[^a-z0-9]", "-", policy.lower())


def _line(line: Line, x_scale: Scale, y_scale: Scale, dots: bool = True) -> str:
    inside = [(x_scale(x), y_scale.clipped(y), y <= y_scale.high) for x, y in line.points]
    shown = inside[: next((number + 1 for number, point in enumerate(inside) if not point[2]), len(inside))]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in shown)
    parts = [f'<g class="series {policy_class(line.policy)}" data-policy="{escape(line.policy)}">']
    if line.intervals:
        ends = [(x_scale(x), y_scale.clipped(low), y_scale.clipped(high)) for (x, _), (low, high) in _pairs(line)]
        ends = ends[: len(shown)]
        around = [f"{x:.1f},{low:.1f}" for x, low, _ in ends] + [f"{x:.1f},{high:.1f}" for x, _, high in reversed(ends)]
        parts.append(f'<polygon class="band" points="{" ".join(around)}"/>')
    parts.append(f'<polyline points="{path}"/>')
    if dots:
        for (x, y, inside_frame), (at, value) in zip(shown, line.points, strict=False):
            if inside_frame:
                hint = f"{line.policy} at {at:g}: {value:.3g}"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>{escape(hint)}</title></circle>')
    parts.append(f"<title>{escape(line.policy)}</title></g>")
    return "".join(parts)


def _pairs(line: Line) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return list(zip(line.points, line.intervals, strict=True))


def _frame(title: str, x_scale: Scale, y_scale: Scale, x_label: str, y_label: str) -> str:
    parts = [_title(title)]
    for tick in x_scale.ticks():
        x = x_scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(tick)}</text>'
        )
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(_y_label(y_label, (TOP + HEIGHT - BOTTOM) / 2))
    return "".join(parts)


def _title(text: str) -> str:
    return f'<text class="title" x="12" y="18">{escape(text)}</text>'


def _y_label(text: str, middle: float) -> str:
    return (
        f'<text class="axis" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'
    )


def _svg(parts: Sequence[str], title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
