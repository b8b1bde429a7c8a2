"""``triptych profile`` without its processes: what is planned, refused and printed."""

from pathlib import Path

import pytest

from common.messages.video import TimelineSpan, VideoTimeline
from common.policies.video.rib import DegreeRule, Rib, VideoKind, paper_rib
from compose.cli import main
from compose.errors import OptionError
from compose.profiling.in_stack import readings_of
from compose.profiling.plan import ProfileOptions, degrees_of, make_plan, slots_of, teams_of
from compose.profiling.table import milliseconds, table

OUT = Path("rib.json")


def test_all_kinds_of_the_model_are_measured_the_smallest_first() -> None:
    plan = make_plan(ProfileOptions(OUT))
    assert len(plan.kinds) == 8
    assert plan.kinds[0] == VideoKind(64, 64, 16) and plan.kinds[-1] == VideoKind(128, 128, 32)
    assert [kind.volume for kind in plan.kinds] == sorted(kind.volume for kind in plan.kinds)


def test_only_what_was_asked_for_is_measured() -> None:
    plan = make_plan(ProfileOptions(OUT, sizes=((64, 64), (128, 128)), frames=(32,)))
    assert plan.kinds == (VideoKind(64, 64, 32), VideoKind(128, 128, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "--slots 0: give 1 or more"),
        (["--repeats", "0"], "--repeats 0: give 1 or more"),
        (["--warm-up", "-1"], "--warm-up -1: give 0 or more"),
        (["--threads", "0"], "--threads 0: give 1 or more"),
        (["--threshold", "1.5"], "--threshold 1.5: give a share of the step time between 0 and 1"),
        (["--in-stack", "--alone"], "--in-stack measures what triptych up starts"),
        (["--in-stack", "--threads", "2"], "--in-stack measures what triptych up starts"),
        (["--size", "65x65"], "--size 65x65: triptych-demo makes 64x64, 96x64, 64x96, 128x128"),
        (["--frames", "17"], "--frames 17: triptych-demo makes 16, 32"),
        (["--video-model", "./nowhere"], "--video-model ./nowhere: no such folder"),
        (["--video-model", "nobody/nothing"], "--video-model: nobody/nothing: no model_index.json there"),
        (["--language-model", "./nowhere"], "--language-model ./nowhere: no such folder"),
        (["--video-model", "none", "--language-model", "none"], "--video-model none, --language-model none: leave"),
        (["--output", "/proc/nowhere/rib.json"], "cannot write /proc/nowhere/rib.json"),
        (["--output", "."], "cannot write .: it is a folder; name a file"),
    ],
)
def test_mistakes_are_named_in_one_line_before_anything_is_started(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"triptych: {message}")
    assert not list(tmp_path.iterdir())


def test_slots_are_the_gpus_there_are_or_what_the_stack_starts_with() -> None:
    assert slots_of(ProfileOptions(OUT), gpus=8) == 8
    assert slots_of(ProfileOptions(OUT), gpus=0) == 2
    assert slots_of(ProfileOptions(OUT, slots=4), gpus=0) == 4
    with pytest.raises(OptionError, match="--slots 4: this machine has 2 GPUs"):
        slots_of(ProfileOptions(OUT, slots=4), gpus=2)
    with pytest.raises(OptionError, match="--device cuda: torch finds no GPU"):
        slots_of(ProfileOptions(OUT, device="cuda"), gpus=0)


def test_degrees_double_up_to_the_slots() -> None:
    assert [degrees_of(slots) for slots in (1, 2, 3, 4, 8)] == [(1,), (1, 2), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


def test_the_other_slots_are_at_work_or_idle() -> None:
    assert list(teams_of(2, 5, alone=False)) == [(0, 1), (2, 3)]
    assert list(teams_of(1, 3, alone=False)) == [(0,), (1,), (2,)]
    assert list(teams_of(2, 5, alone=True)) == [(0, 1)]


@pytest.mark.parametrize("rule", list(DegreeRule))
def test_the_papers_figures_give_its_optimal_degrees(rule: DegreeRule) -> None:
    rib = Rib(paper_rib().profiles, rule)
    text = table(rib, dict.fromkeys(rib.profiles, 100))
    head, *rows = (line.split() for line in text.splitlines())
    assert head[-2:] == ["optimal", "VAE"]
    assert [row[-3] for row in rows] == ["1", "2", "4"]
    assert [row for row in rows[2] if row.startswith(("+", "-"))] == ["+46", "+47", "+34"]


def test_the_columns_are_in_line() -> None:
    rib = paper_rib()
    lines = table(rib, {kind: 10**index for index, kind in enumerate(rib.profiles)}).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_milliseconds_have_three_digits() -> None:
    assert [milliseconds(value) for value in (0.0012345, 0.012345, 0.12345, 12.345)] == [
        "1.23 ms", "12.3 ms", "123 ms", "12345 ms",
    ]  # fmt: skip


def test_a_finished_video_shows_what_its_steps_and_the_rest_of_it_took() -> None:
    def span(
        phase: str, started_at_s: float, ended_at_s: float, step: int | None = None, slot: int = 0
    ) -> TimelineSpan:
        return TimelineSpan(
            instance="x",
            slot=slot,
            phase=phase,
            step=step,
            degree_of_parallelism=2,
            started_at_s=started_at_s,
            ended_at_s=ended_at_s,
        )

    steps = [span("step", 10.5 + step, 11.25 + step, step, slot) for step in (1, 2, 3) for slot in (0, 1)]
    spans = (span("encode", 10.25, 10.5), *steps, span("decode", 14.5, 16.25))
    readings = readings_of(VideoTimeline(job_id="video", spans=spans), asked_at_s=10.0, heard_at_s=16.5)
    assert readings.step_s == (1.0, 1.0)
    # From the last step's end at 14.25; before the first step 1.5 s, and a quarter after the file was stored.
    assert (readings.decode_s, readings.rest_s) == (2.0, 1.75)
