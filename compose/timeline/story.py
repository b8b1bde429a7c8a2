"""What page and trace are made of: videos with their timelines, and where each piece of work stands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.messages.video import TimelineSpan, VideoTimeline

PHASES = {"encode": "text encoder", "step": "denoising step", "decode": "VAE decode"}


@dataclass(frozen=True)
class Story:
    """One video: its prompt, what else tells it from others, and what was done for it."""

    prompt: str
    timeline: VideoTimeline
    detail: str = ""


class Row(NamedTuple):
    """A slot (one GPU, whichever worker of it was at work), or an instance that has none. Those without come first."""

    slot: int
    instance: str

    @property
    def name(self) -> str:
        return f"slot {self.slot}" if self.slot >= 0 else self.instance


@dataclass(frozen=True)
class Piece:
    """A span on one of its rows. ``video`` is the index of its story."""

    row: Row
    video: int
    span: TimelineSpan


def rows_of(span: TimelineSpan) -> list[Row]:
    """Every slot that took part; a timeline stored by an older scheduler knows only the leader's."""
    slots = span.slots or (() if span.slot is None else (span.slot,))
    return [Row(slot, "") for slot in slots] or [Row(-1, span.instance)]


def pieces(stories: Sequence[Story]) -> list[Piece]:
    """All spans of all videos, a step that several slots did together once for each."""
    return [
        Piece(row, video, span)
        for video, story in enumerate(stories)
        for span in story.timeline.spans
        for row in rows_of(span)
    ]


def bounds_s(found: Iterable[Piece]) -> tuple[float, float]:
    """When the first work began and the last ended, in Unix seconds; (0, 0) without any."""
    spans = [piece.span for piece in found]
    if not spans:
        return 0.0, 0.0
    return min(span.started_at_s for span in spans), max(span.ended_at_s for span in spans)


def took_s(span: TimelineSpan) -> float:
    return span.ended_at_s - span.started_at_s


def what(span: TimelineSpan) -> str:
    """The work in words: ``denoising step 3``."""
    return PHASES.get(span.phase, span.phase) + ("" if span.step is None else f" {span.step}")


def together(span: TimelineSpan) -> str:
    """With how many others, in words; empty where alone."""
    if span.degree_of_parallelism < 2:
        return ""
    named = f" ({', '.join(map(str, span.slots))})" if span.slots else ""
    return f"together on {span.degree_of_parallelism} slots{named}"
