"""The timeline of a job as one self-contained HTML page: which slot did which step of it, and when."""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from common.messages.video import TimelineSpan, VideoTimeline

_PAGE = Path(__file__).with_name("timeline.html")
_LABEL_WIDTH = 150
_CHART_WIDTH = 1000
_ROW_HEIGHT = 46
_BAR_HEIGHT = 30
_AXIS_HEIGHT = 34
_NARROWEST_LABELLED = 18
_PHASES = {"encode": "text encoder", "step": "denoising step", "decode": "VAE decode"}


@dataclass(frozen=True)
class _Scale:
    """Seconds since the job's first span, as positions on the page."""

    origin_s: float
    length_s: float

    def x(self, moment_s: float) -> float:
        return _LABEL_WIDTH + (moment_s - self.origin_s) / self.length_s * _CHART_WIDTH


def write_timeline(target: Path, timeline: VideoTimeline, prompt: str) -> None:
    """Write the page. A timeline without spans gives a page that says so."""
    page = Template(_PAGE.read_text(encoding="utf-8"))
    target.write_text(
        page.substitute(
            prompt=escape(prompt),
            job_id=escape(timeline.job_id),
            facts=_facts(timeline.spans),
            legend=_legend(timeline.spans),
            chart=_chart(timeline.spans),
        ),
        encoding="utf-8",
    )


def _chart(spans: tuple[TimelineSpan, ...]) -> str:
    if not spans:
        return "<p>No work was recorded for this job.</p>"
    start_s = min(span.started_at_s for span in spans)
    end_s = max(span.ended_at_s for span in spans)
    scale = _Scale(start_s, max(end_s - start_s, 1e-6))
    rows = sorted({_row(span) for span in spans})
    height = len(rows) * _ROW_HEIGHT + _AXIS_HEIGHT
    parts = [
        f'<svg viewBox="0 0 {_LABEL_WIDTH + _CHART_WIDTH + 20} {height}" role="img" '
        f'aria-label="What each instance did, over {scale.length_s:.2f} seconds">'
    ]
    parts += _axis(scale, len(rows) * _ROW_HEIGHT)
    for index, row in enumerate(rows):
        middle = index * _ROW_HEIGHT + _ROW_HEIGHT / 2
        parts.append(
            f'<line class="row" x1="{_LABEL_WIDTH}" x2="{_LABEL_WIDTH + _CHART_WIDTH}" y1="{middle}" y2="{middle}"/>'
        )
        where = "" if row[1] is None else f'<tspan class="slot" dx="8">slot {row[1]}</tspan>'
        parts.append(f'<text class="name" x="0" y="{middle + 5}">{escape(row[2])}{where}</text>')
        parts += [_box(span, scale, middle) for span in spans if _row(span) == row]
    return "\n".join([*parts, "</svg>"])


def _row(span: TimelineSpan) -> tuple[int, int | None, str]:
    """Rows sort by what has no slot first, then slot by slot; -1 stands in for none while sorting."""
    return (-1 if span.slot is None else span.slot, span.slot, span.instance)


def _box(span: TimelineSpan, scale: _Scale, middle: float) -> str:
    left, right = scale.x(span.started_at_s), scale.x(span.ended_at_s)
    width = max(right - left, 1.5)
    shade = " odd" if span.step is not None and span.step % 2 else ""
    what = _PHASES.get(span.phase, span.phase) + ("" if span.step is None else f" {span.step}")
    together = f", together on {span.degree_of_parallelism} slots" if span.degree_of_parallelism > 1 else ""
    start_s = span.started_at_s - scale.origin_s
    hint = f"{what} on {span.instance}{together}\nfrom {start_s:.3f} s, took {_took(span):.3f} s"
    label = str(span.step) if span.step is not None else span.phase
    fits = width >= _NARROWEST_LABELLED * max(1.0, len(label) / 2)
    text = f'<text x="{left + width / 2:.2f}" y="{middle + 4:.2f}">{escape(label)}</text>' if fits else ""
    # A hair's breadth between neighbours, so that equal steps read as separate ones.
    return (
        f'<g class="span {escape(span.phase)}{shade}"><title>{escape(hint)}</title>'
        f'<rect x="{left:.2f}" y="{middle - _BAR_HEIGHT / 2:.2f}" width="{max(width - 0.8, 1):.2f}" '
        f'height="{_BAR_HEIGHT}" rx="{min(4.0, width / 4):.2f}"/>{text}</g>'
    )


def _axis(scale: _Scale, bottom: int) -> list[str]:
    step_s = _tick_s(scale.length_s)
    decimals = max(0, -math.floor(math.log10(step_s)))
    parts = []
    for index in range(math.floor(scale.length_s / step_s + 1e-9) + 1):
        x = scale.x(scale.origin_s + index * step_s)
        parts.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.2f}" y="{bottom + 22}">{index * step_s:.{decimals}f} s</text>')
    return parts


def _tick_s(length_s: float) -> float:
    """A round distance between ticks (1, 2 or 5 times a power of ten) that gives about eight of them."""
    rough = length_s / 8
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _facts(spans: tuple[TimelineSpan, ...]) -> str:
    if not spans:
        return ""
    length_s = max(span.ended_at_s for span in spans) - min(span.started_at_s for span in spans)
    steps = [span for span in spans if span.phase == "step"]
    facts = [("from first to last", f"{length_s:.2f} s")]
    if steps:
        facts.append(("steps", str(len({span.step for span in steps}))))
        facts.append(("median step", f"{_median([_took(span) for span in steps]) * 1000:.0f} ms"))
        facts.append(("degree of parallelism", _range([span.degree_of_parallelism for span in steps])))
    facts.append(("slot time", f"{sum(_took(span) for span in spans if span.slot is not None):.2f} s"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)


def _legend(spans: tuple[TimelineSpan, ...]) -> str:
    items = []
    for phase, name in _PHASES.items():
        busy_s = sum(_took(span) for span in spans if span.phase == phase)
        items.append(f'<li class="{phase}"><i></i>{name} <b>{busy_s:.2f} s</b></li>')
    return "".join(items)


def _took(span: TimelineSpan) -> float:
    return span.ended_at_s - span.started_at_s


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
