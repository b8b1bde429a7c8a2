"""Timelines in the Trace Event Format, which chrome://tracing and Perfetto (https://ui.perfetto.dev) load.

Two groups of tracks: the slots, each with what it did, and the videos, each with what was done for it. Every piece of
work is a complete event ("ph": "X") whose times are microseconds since the first one began; "otherData" says when
that was.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compose.files import write_whole
from compose.timeline.story import Piece, Row, Story, bounds_s, pieces

_SLOTS, _VIDEOS = 1, 2
_LONGEST_PROMPT = 60


def write_trace(target: Path, stories: Sequence[Story]) -> None:
    """Write the trace."""
    write_whole(target, json.dumps(trace(stories), ensure_ascii=False, separators=(",", ":")) + "\n")


def trace(stories: Sequence[Story]) -> dict[str, Any]:
    """The file's content."""
    found = pieces(stories)
    origin_s, _ = bounds_s(found)
    rows = sorted({row for piece in found for row in piece.rows})
    number = {row: index for index, row in enumerate(rows)}
    events = [*_names(rows, stories)]
    for piece in found:
        tracks = [*((_SLOTS, number[row]) for row in piece.rows), (_VIDEOS, piece.video)]
        events += [_event(piece, stories[piece.video], origin_s, *track) for track in tracks]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"started_at_s": origin_s, "videos": len(stories)},
    }


def _event(piece: Piece, story: Story, origin_s: float, group: int, track: int) -> dict[str, Any]:
    span = piece.span
    name = span.phase if span.step is None else f"step {span.step}"
    if span.degree_of_parallelism > 1:
        name += f" ×{span.degree_of_parallelism}"
    return {
        "name": name,
        "cat": span.phase,
        "ph": "X",
        "ts": round((span.started_at_s - origin_s) * 1e6, 3),
        "dur": round(max(piece.took_s, 0.0) * 1e6, 3),
        "pid": group,
        "tid": track,
        "args": {
            "video": story.timeline.job_id,
            "prompt": story.prompt,
            "instance": span.instance,
            "slots": list(piece.slots),
            "degree_of_parallelism": span.degree_of_parallelism,
            **({} if span.step is None else {"step": span.step}),
        },
    }


def _names(rows: Sequence[Row], stories: Sequence[Story]) -> Iterator[dict[str, Any]]:
    """What groups and tracks are called, and in which order they stand."""
    for group, name in ((_SLOTS, "slots"), (_VIDEOS, "videos")):
        yield _named("process_name", group, 0, {"name": name})
        yield _named("process_sort_index", group, 0, {"sort_index": group})
    tracks = [(_SLOTS, index, row.name) for index, row in enumerate(rows)]
    tracks += [
        (_VIDEOS, index, f"{index + 1}. {story.prompt[:_LONGEST_PROMPT]}") for index, story in enumerate(stories)
    ]
    for group, track, name in tracks:
        yield _named("thread_name", group, track, {"name": name})
        yield _named("thread_sort_index", group, track, {"sort_index": track})


def _named(kind: str, group: int, track: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": group, "tid": track, "args": arguments}
