"""``triptych timeline``: the stored timelines of many videos in one page and one trace."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.client import StackClient
from compose.errors import OptionError, ServerError
from compose.files import prepare_file
from compose.spec import seconds
from compose.timeline.page import write_page
from compose.timeline.story import Story
from compose.timeline.trace import write_trace
from compose.up import report

# How many timelines are asked for at a time.
_AT_ONCE = 8


@dataclass(frozen=True)
class Choice:
    """Which videos: those of ``ids``; without any, all there are, or those ordered within ``since`` (such as 10m)."""

    ids: tuple[str, ...] = ()
    since: str | None = None


def run_timeline(base_url: str, choice: Choice, page: Path | None, trace: Path | None) -> int:
    """Write what was asked for; returns the exit code.

    Raises:
        OptionError: nothing to write, or it cannot be written, or no duration.
        ServerError: the stack does not answer, or has no such video, or none that is finished.
    """
    if page is None and trace is None:
        raise OptionError("nothing to write: name a page with -o FILE, a trace with --trace FILE, or both")
    within_s = None if choice.since is None else seconds(choice.since, "--since")
    written = [path for path in (page, trace) if path is not None]
    for path in written:
        prepare_file(path)
    stories = asyncio.run(_stories(base_url, choice.ids, within_s))
    if page is not None:
        write_page(page, stories)
    if trace is not None:
        write_trace(trace, stories)
    for path in written:
        report(str(path))
    return 0


async def _stories(base_url: str, ids: Sequence[str], within_s: float | None) -> list[Story]:
    """The finished ones of the videos, in order of creation."""
    async with StackClient(base_url) as client:
        if ids:
            videos = [await client.retrieve(video_id) for video_id in ids]
        else:
            oldest_s = 0.0 if within_s is None else time.time() - within_s
            videos = [video async for video in client.videos() if video["created_at"] >= oldest_s]
        finished = sorted(
            (video for video in videos if video["status"] == "completed"),
            key=lambda video: (video["created_at"], video["id"]),
        )
        if len(finished) < len(videos):
            report(f"{len(videos) - len(finished)} of {len(videos)} videos are left out: they are not completed")
        if not finished:
            raise ServerError("there is no finished video whose timeline could be shown")
        gate = asyncio.Semaphore(_AT_ONCE)

        async def story(video: dict[str, Any]) -> Story:
            async with gate:
                return Story(video["prompt"], await client.timeline(video["id"]), detail_of(video))

        return list(await asyncio.gather(*map(story, finished)))


def detail_of(video: dict[str, Any]) -> str:
    """Size, frames, steps, and what was asked for besides."""
    parts = [str(video["size"]), f"{video['frames']} frames", f"{video['steps']} steps"]
    if video.get("priority"):
        parts.append(f"priority {video['priority']}")
    if video.get("deadline_at") is not None:
        # A video's creation is told in whole seconds, rounded down, so that up to one too many lies between the two.
        parts.append(f"deadline after {int(video['deadline_at'] - video['created_at'] + 1e-3)} s")
    return ", ".join(parts)
