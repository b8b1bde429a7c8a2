"""Timelines as one self-contained HTML page: which slot did which step of which video, and when."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from compose.files import write_whole
from compose.timeline.chart import chart, hue
from compose.timeline.story import PHASES, Story, bounds_s, pieces

_PAGE = Path(__file__).with_name("page.html")
# More would fill the page before the chart begins; the boxes name their videos themselves.
_NAMED_VIDEOS = 24
_LONGEST_PROMPT = 48


def write_page(target: Path, stories: Sequence[Story]) -> None:
    """Write the page, of one video by its phases, of several by video. Without any work it says so."""
    page = Template(_PAGE.read_text(encoding="utf-8"))
    one = stories[0] if len(stories) == 1 else None
    write_whole(
        target,
        page.substitute(
            title=escape(one.prompt) if one else f"{len(stories)} videos",
            subtitle=escape(f"{one.timeline.job_id} {one.detail}".strip()) if one else "one colour for each",
            facts=_facts(stories),
            legend=_phases(one) if one else _videos(stories),
            chart=chart(stories),
        ),
    )


def _facts(stories: Sequence[Story]) -> str:
    found = pieces(stories)
    if not found:
        return ""
    start_s, end_s = bounds_s(found)
    steps = [piece for piece in found if piece.span.phase == "step"]
    facts = [("from first to last", f"{end_s - start_s:.2f} s")]
    if len(stories) > 1:
        facts.append(("videos", str(len(stories))))
    if steps:
        facts.append(("steps", str(len(steps))))
        facts.append(("median step", f"{statistics.median(piece.took_s for piece in steps) * 1000:.0f} ms"))
        facts.append(("degree of parallelism", _range([piece.span.degree_of_parallelism for piece in steps])))
    slots = {slot for piece in found for slot in piece.slots}
    busy_s = sum(piece.slot_s for piece in found)
    facts.append(("slot time", f"{busy_s:.2f} s"))
    if slots and end_s > start_s:
        facts.append(("slots at work", f"{100 * busy_s / (len(slots) * (end_s - start_s)):.0f} % of {len(slots)}"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)


def _phases(story: Story) -> str:
    found = pieces([story])
    items = []
    for phase, name in PHASES.items():
        busy_s = sum(piece.took_s for piece in found if piece.span.phase == phase)
        items.append(f'<li class="{phase}"><i></i>{name} <b>{busy_s:.2f} s</b></li>')
    return "".join(items)


def _videos(stories: Sequence[Story]) -> str:
    items = []
    for video, story in enumerate(stories[:_NAMED_VIDEOS]):
        short = story.prompt if len(story.prompt) <= _LONGEST_PROMPT else f"{story.prompt[: _LONGEST_PROMPT - 1]}…"
        slot_s = sum(piece.slot_s for piece in pieces([story]))
        detail = f" {escape(story.detail)}" if story.detail else ""
        colour = f'class="video" style="--hue: {hue(video):.0f}"'
        items.append(f"<li {colour}><i></i>{escape(short)}{detail} <b>{slot_s:.2f} s</b></li>")
    if len(stories) > _NAMED_VIDEOS:
        items.append(f"<li>and {len(stories) - _NAMED_VIDEOS} more</li>")
    return "".join(items)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
