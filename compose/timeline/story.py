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
    """One piece of work, on all the rows that did it together. ``video`` is the index of its story.

    ``span`` is that of the first row; the others' have the same times.
    """

    video: int
    span: TimelineSpan
    rows: tuple[Row, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(row.slot for row in self.rows if row.slot >= 0)

    @property
    def took_s(self) -> float:
        return self.span.ended_at_s - self.span.started_at_s

    @property
    def slot_s(self) -> float:
        """Seconds of slots."""
        return self.took_s * len(self.slots)

    @property
    def what(self) -> str:
        """The work in words: ``denoising step 3``."""
        span = self.span
        return PHASES.get(span.phase, span.phase) + ("" if span.step is None else f" {span.step}")

    @property
    def together(self) -> str:
        """With how many others, in words; empty where alone."""
        degree = self.span.degree_of_parallelism
        return f"together on {degree} slots ({', '.join(map(str, self.slots))})" if degree > 1 else ""


def row_of(span: TimelineSpan) -> Row:
    return Row(-1, span.instance) if span.slot is None else Row(span.slot, "")


def pieces(stories: Sequence[Story]) -> list[Piece]:
    """All work on all videos. A step has one span for each slot; they are brought together here."""
    found: dict[tuple[int, str, int | None, float], list[TimelineSpan]] = {}
    for video, story in enumerate(stories):
        for number, span in enumerate(story.timeline.spans):
            # A step that was done again after a loss began at another time.
            when = number if span.step is None else span.started_at_s
            found.setdefault((video, span.phase, span.step, when), []).append(span)
    return [Piece(key[0], spans[0], tuple(dict.fromkeys(map(row_of, spans)))) for key, spans in found.items()]


def bounds_s(found: Iterable[Piece]) -> tuple[float, float]:
    """When the first work began and the last ended, in Unix seconds; (0, 0) without any."""
    spans = [piece.span for piece in found]
    if not spans:
        return 0.0, 0.0
    return min(span.started_at_s for span in spans), max(span.ended_at_s for span in spans)
