"""``triptych profile`` with real processes and a small model: measured, written, read by the scheduler's own class."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from common.messages.video import TimelineSpan
from common.policies.language.language_costs import LanguageCosts
from common.policies.language.prefill_profile import PrefillProfile
from common.policies.video.rib import DegreeRule, Rib, VideoKind
from compose.client import StackClient
from compose.errors import StartError
from compose.launch import PACKAGE_ROOT
from compose.local import StackOptions, check_scheduling, variable_values
from compose.profiling.in_stack import make_one
from compose.rundir import run_directory
from tests.support.small_model import save_small_model

KIND = VideoKind(32, 32, 13)


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compose.cli", "profile", *arguments],
        cwd=PACKAGE_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


def _parts(lines: list[str]) -> list[list[str]]:
    """What stands between empty lines."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if line:
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def test_the_profile_of_this_machine_is_what_the_stack_reads(model: Path, language_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "rib.json"
    options = ["--video-model", str(model), "--slots", "2", "--size", "32x32", "48x32", "--frames", "13"]
    options += ["--language-model", str(language_model), "--rule", "threshold"]
    done = profile(*options, "--repeats", "2", "--warm-up", "1", "-o", str(target))
    assert done.returncode == 0, done.stderr
    rib = Rib.from_json(target.read_text())
    assert list(rib.profiles) == [KIND, VideoKind(48, 32, 13)]
    assert rib.degrees == (1, 2) and rib.rule is DegreeRule.THRESHOLD
    profiled = rib.profiles[KIND]
    assert all(0 < seconds < 60 for seconds in (*profiled.step_s.values(), profiled.decode_s, profiled.encode_s))
    *lines, note, path = done.stdout.splitlines()
    (head, first, second), (notes,), (chunks, *rates), (chosen,), (fits, *fitted) = _parts(lines)
    assert head.split()[:3] == ["size", "frames", "tokens"]
    assert first.split()[:3] == ["32x32", "13", "64"] and second.split()[:3] == ["48x32", "13", "96"]
    assert "2 slots of cpu, all slots at work" in notes and path == str(target)
    assert list(target.parent.iterdir()) == [target]
    prefill = PrefillProfile.from_json(target.read_text())
    assert prefill is not None and prefill.model == language_model.name
    assert chunks.split() == ["chunk", "tokens/s", "of", "the", "best"] and len(rates) == len(prefill.tokens_per_s) > 2
    assert [line.split()[0] for line in rates if "chosen" in line] == [str(prefill.chunk_tokens)]
    assert chosen.startswith(f"prefill of {language_model.name}: ")
    assert fits.split() == ["mean", "error", "worst", "points"]
    assert [line.split()[0] for line in fitted] == ["prefill", "decode", "transfer"] and language_model.name in note
    costs = LanguageCosts.from_json(target.read_text())
    assert costs is not None and costs.prefill.chunk_tokens == prefill.chunk_tokens
    assert costs.prefill.exec_s(100, 0) > 0 and costs.decode.step_s(1, 100) > 0
    served = StackOptions(language_model=str(language_model), rib=target)
    check_scheduling(served)
    with run_directory(None) as directory:
        assert variable_values(served, directory, 1)["TRIPTYCH_CHUNK_TOKENS"] == str(prefill.chunk_tokens)
        assert variable_values(served, directory, 1)["TRIPTYCH_COSTS"] == str(target)


def test_videos_of_a_whole_stack_are_measured_too(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "rib.json"
    options = ["--in-stack", "--slots", "1", "--size", "32x32", "--frames", "13", "--repeats", "2", "--warm-up", "1"]
    done = profile("--video-model", str(model), "--language-model", "none", *options, "-o", str(target))
    assert done.returncode == 0, done.stderr
    rib = Rib.from_json(target.read_text())
    profiled = rib.profiles[KIND]
    assert rib.degrees == (1,) and "1 slots of a stack, all at work" in done.stdout
    assert all(0 < seconds < 60 for seconds in (*profiled.step_s.values(), profiled.decode_s, profiled.encode_s))


def span(phase: str, ended_at_s: float, step: int | None = None) -> TimelineSpan:
    """One second of a video."""
    began_s = ended_at_s - 1.0
    return TimelineSpan(
        instance="x",
        slot=0,
        phase=phase,
        step=step,
        degree_of_parallelism=1,
        started_at_s=began_s,
        ended_at_s=ended_at_s,
    )


@pytest.mark.parametrize("state", ["completed", "failed"])
async def test_where_the_events_break_off_before_the_last_the_record_says_whether_a_video_was_made(state: str) -> None:
    spans = [span("step", 2.0, 1), span("step", 3.5, 2), span("decode", 6.0)]
    answers = {
        "/v1/videos": {"id": "a"},
        "/v1/videos/a/events": {"state": "decoding"},
        "/v1/videos/a": {"state": state, "error": {"message": "no memory"}},
        "/v1/videos/a/timeline": {"id": "a", "spans": [each.model_dump(mode="json") for each in spans]},
    }

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        body = json.dumps(answers[request.path])
        if not request.path.endswith("/events"):
            return web.Response(text=body)
        events = web.StreamResponse()
        await events.prepare(request)
        await events.write(f"data: {body}\n\n".encode())
        if request.transport is not None:
            request.transport.close()
        return events

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0]
        async with StackClient(f"http://{host}:{port}") as client:
            if state == "completed":
                made = await make_one(client, KIND, steps=2, number=0)
                assert (made.step_s, made.decode_s) == ((1.5,), 2.5)
            else:
                with pytest.raises(StartError, match=r"a video of 32x32 was not made: .*no memory"):
                    await make_one(client, KIND, steps=2, number=0)
    finally:
        await runner.cleanup()


def test_a_process_that_cannot_measure_says_why_in_one_line(model: Path, tmp_path: Path) -> None:
    """Here for want of a part of the model. The file that was there stays."""
    target, broken = tmp_path / "rib.json", tmp_path / "model"
    target.write_text("before")
    shutil.copytree(model, broken)
    (broken / "transformer" / "config.json").unlink()
    done = profile("--video-model", str(broken), "--slots", "1", "-o", str(target))
    assert done.returncode == 1
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("triptych: the measuring process slot-0: ModelLoadError: ")
    assert target.read_text() == "before"
