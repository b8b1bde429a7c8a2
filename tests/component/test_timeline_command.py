"""``triptych timeline`` against a real gateway: which videos, where to, and one clear line for what cannot be."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.messages.subjects import VIDEO_TIMELINES
from common.messages.video import TimelineSpan, VideoTimeline
from compose.cli import main
from compose.timeline.command import detail_of
from tests.component.gateway_support import ThreadedStack, threaded_stack


@pytest.fixture(scope="module")
def threaded() -> Iterator[ThreadedStack]:
    with threaded_stack() as running:
        yield running


async def _finished(running: ThreadedStack, prompt: str, start_s: float) -> str:
    """A completed video whose two steps were taken on slot 0, then on both slots."""
    stack = running.stack
    video_id = str((await stack.create(prompt=prompt, priority=3))["id"])
    await stack.complete(video_id, b"film")
    spans = tuple(
        TimelineSpan(
            instance=f"dit-{slot}",
            slot=slot,
            phase="step",
            step=step,
            degree_of_parallelism=len(slots),
            started_at_s=start_s + step,
            ended_at_s=start_s + step + 1,
        )
        for step, slots in ((1, (0,)), (2, (0, 1)))
        for slot in slots
    )
    await stack.bus.put(VIDEO_TIMELINES, video_id, VideoTimeline(job_id=video_id, spans=spans))
    return video_id


async def _waiting(running: ThreadedStack) -> None:
    await running.stack.create(prompt="still waits")


def _timeline(running: ThreadedStack, *arguments: str) -> int:
    return main(["timeline", "--base-url", running.stack.url, *arguments])


def test_page_and_trace_of_the_whole_stack(
    threaded: ThreadedStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [threaded.run(_finished(threaded, f"video {number}", 100.0 + 10 * number)) for number in range(2)]
    threaded.run(_waiting(threaded))
    page, trace = tmp_path / "out" / "page.html", tmp_path / "trace.json"
    assert _timeline(threaded, "--all", "-o", str(page), "--trace", str(trace)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["1 of 3 videos are left out: they are not completed", str(page), str(trace)]
    text = page.read_text(encoding="utf-8")
    assert text.count('<g class="span step') == 2 * 3, "the step that two slots did stands on both"
    assert "<h1>2 videos</h1>" in text and "priority 3" in text
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["args"]["video"] for event in events if event["ph"] == "X"} == set(ids)
    assert sum(event["ph"] == "X" and event["pid"] == 1 for event in events) == 2 * 3

    assert _timeline(threaded, ids[1], "--trace", str(trace)) == 0
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["args"]["video"] for event in events if event["ph"] == "X"} == {ids[1]}
    assert _timeline(threaded, "--since", "10m", "-o", str(page)) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--all"], 2, "nothing to write: name a page with -o FILE"),
        (["--since", "10", "-o", "a.html"], 2, "--since: '10' is no duration such as 500ms, 10s or 1m30s"),
        (["video_nobody", "-o", "a.html"], 1, "video_nobody"),
        (["../models", "-o", "a.html"], 1, "There is no video '../models'"),
        (["--since", "1us", "-o", "a.html"], 1, "there is no finished video"),
        (["--all", "-o", "."], 2, "cannot write .: it is a folder"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    threaded: ThreadedStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _timeline(threaded, *arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("triptych: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_which_videos_must_be_said(threaded: ThreadedStack, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _timeline(threaded, "-o", "a.html")
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize(("after_s", "told"), [(60.0, "60 s"), (60.99, "60 s"), (9.5, "9 s"), (59.9999, "60 s")])
def test_a_deadline_is_told_as_it_was_asked_for(after_s: float, told: str) -> None:
    video = {"size": "64x64", "frames": 16, "steps": 4, "created_at": 100, "deadline_at": 100 + after_s}
    assert detail_of(video) == f"64x64, 16 frames, 4 steps, deadline after {told}"
