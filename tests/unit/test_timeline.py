"""The timeline's page and trace: every piece of work on every slot that did it."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.messages.video import TimelineSpan, VideoTimeline
from compose.timeline.chart import chart
from compose.timeline.page import write_page
from compose.timeline.story import Row, Story, pieces
from compose.timeline.trace import trace, write_trace


def span(
    phase: str, start_s: float, end_s: float, slots: tuple[int, ...] = (), step: int | None = None
) -> tuple[TimelineSpan, ...]:
    """One piece of work as the scheduler stores it: a span for each slot, the leader's first."""
    service = {"encode": "encoder", "step": "dit", "decode": "vae"}[phase]
    return tuple(
        TimelineSpan(
            instance=f"{service}-{slot or 0}",
            slot=slot,
            phase=phase,
            step=step,
            degree_of_parallelism=max(len(slots), 1),
            started_at_s=start_s,
            ended_at_s=end_s,
        )
        for slot in (slots or (None,))
    )


def story(number: int, start_s: float) -> Story:
    """A video that starts on one slot, grows to two, and is decoded on the first."""
    spans = (
        *span("encode", start_s, start_s + 0.1),
        *span("step", start_s + 0.1, start_s + 1.1, (1,), 1),
        *span("step", start_s + 1.1, start_s + 1.7, (1, 0), 2),
        *span("decode", start_s + 1.7, start_s + 2.0, (1,)),
    )
    return Story(f"video <{number}> & more", VideoTimeline(job_id=f"video_{number}", spans=spans), "64x64, 16 frames")


def drawing(stories: list[Story]) -> ElementTree.Element:
    return ElementTree.fromstring(chart(stories))


def boxes(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [group for group in root.iter("g") if group.get("class", "").startswith("span ")]


def test_a_step_of_several_slots_is_one_piece_of_work() -> None:
    found = pieces([story(1, 100.0)])
    assert [piece.rows for piece in found] == [
        (Row(-1, "encoder-0"),), (Row(1, ""),), (Row(1, ""), Row(0, "")), (Row(1, ""),),
    ]  # fmt: skip
    assert [piece.slot_s for piece in found] == pytest.approx([0, 1.0, 1.2, 0.3])
    assert found[2].together == "together on 2 slots (1, 0)" and found[1].together == ""


def test_two_videos_steps_that_began_at_the_same_time_stay_apart() -> None:
    assert len(pieces([story(1, 100.0), story(2, 100.0)])) == 8


def test_the_drawing_of_one_video_has_a_row_for_each_slot() -> None:
    root = drawing([story(1, 100.0)])
    assert [text.text for text in root.iter("text") if text.get("class") == "name"] == ["encoder-0", "slot 0", "slot 1"]
    assert len(boxes(root)) == 5
    shared = [box for box in boxes(root) if "shared" in box.get("class", "")]
    assert len(shared) == 2
    assert all("together on 2 slots (1, 0)" in (box.findtext("title") or "") for box in shared)
    assert all("--hue" not in box.get("style", "") for box in boxes(root))


def test_among_several_videos_each_has_its_colour_and_its_name() -> None:
    root = drawing([story(1, 100.0), story(2, 103.0)])
    colours = {box.get("style") for box in boxes(root)}
    assert len(colours) == 2
    titles = [box.findtext("title") or "" for box in boxes(root)]
    assert sum("video <1> & more" in title for title in titles) == sum("video_2" in title for title in titles) == 5


def test_many_steps_make_a_wider_page_not_thinner_boxes() -> None:
    steps = tuple(span("step", 0.01 * step, 0.01 * (step + 1), (0,), step + 1)[0] for step in range(1000))
    root = drawing([Story("long", VideoTimeline(job_id="video_1", spans=steps))])
    width = float((root.get("viewBox") or "").split()[2])
    assert 6000 < width < 6500
    ticks = [text.text for text in root.iter("text") if text.get("class") == "tick"]
    assert ticks[:3] == ["0.0 s", "0.5 s", "1.0 s"]


def test_nothing_to_draw_is_said() -> None:
    assert chart([Story("none", VideoTimeline(job_id="video_1", spans=()))]) == "<p>No work was recorded.</p>"


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_page_is_one_file_without_anything_from_elsewhere(tmp_path: Path, count: int) -> None:
    target = tmp_path / "page.html"
    write_page(target, [story(number, 100.0 + number) for number in range(count)])
    page = target.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=", page) and "$" not in page
    assert ("video &lt;0&gt; &amp; more" in page) and "<0>" not in page
    assert page.count('<g class="span ') == 5 * count
    assert ("and 16 more" in page) == (count == 40)
    assert f"<dd>{2 * count}</dd>" in page, "the number of steps"
    assert list(tmp_path.iterdir()) == [target]


def test_the_trace_has_a_track_for_each_slot_and_each_video(tmp_path: Path) -> None:
    target = tmp_path / "trace.json"
    write_trace(target, [story(1, 100.0), story(2, 103.0)])
    content = json.loads(target.read_text(encoding="utf-8"))
    assert content == trace([story(1, 100.0), story(2, 103.0)])
    events = content["traceEvents"]
    assert all({"name", "ph", "ts", "pid", "tid"} <= set(event) for event in events)
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == ["encoder-0", "slot 0", "slot 1", "1. video <1> & more", "2. video <2> & more"]
    done = [event for event in events if event["ph"] == "X"]
    assert len(done) == 2 * (5 + 4)
    first = next(event for event in done if event["name"] == "step 2 ×2")
    assert first["args"]["slots"] == [1, 0] and first["args"]["degree_of_parallelism"] == 2
    assert (first["ts"], first["dur"]) == (pytest.approx(1.1e6), pytest.approx(0.6e6))
    assert {names[event["pid"], event["tid"]] for event in done if event["name"] == "step 2 ×2"} == {
        "slot 0", "slot 1", "1. video <1> & more", "2. video <2> & more",
    }  # fmt: skip
    assert content["otherData"] == {"started_at_s": 100.0, "videos": 2}
