"""The whole stack as ``triptych up`` runs it: real processes, real broker, real UCX, the shipped model."""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import openai
import psutil
import pytest
from PIL import Image

from common.messages.video import VideoTimeline
from common.models.demo.clips import Action, Shape
from common.models.demo.reading import read_caption
from compose.launch import PACKAGE_ROOT
from services.dit.checkpoints import STORE_DEADLINE_S
from tests.support.stack import (
    START_S,
    VIDEO_MODEL,
    VIDEO_S,
    Stack,
    posix_shared_memory,
    running_stack,
    system_v_shared_memory,
)

PROMPT = "a red circle moving right"
LONG = 100  # steps: enough for a kill to fall into the middle
# Steps that a killed worker may cost: one between two checkpoints, one whose checkpoint was on its way to the cache
# store, and one that the client heard of last.
LOST = 3
# Videos that are disturbed beside those of the tests' own, at a random step; ``TRIPTYCH_TEST_SEED`` repeats a draw.
KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "1"))
SEED = int(os.environ["TRIPTYCH_TEST_SEED"])
VICTIMS = (
    "dit-0",
    "scheduler-0",
    "vae-0",
    "nats-0",
    "dit-1",
    "encoder-0",
    "vae-1",
    "cache_store-0",
    "gateway-0",
    "decode-0",
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> None:
    """Whatever the test before has killed is back."""
    if "stack" in request.fixturenames:
        running: Stack = request.getfixturevalue("stack")
        running.wait_whole()


@pytest.fixture(scope="module")
def request_fields(stack: Stack) -> dict[str, Any]:
    """A small video, every value spelled out."""
    limits = stack.limits()
    width, height = min(
        (tuple(map(int, size.split("x"))) for size in limits["sizes"]), key=lambda size: size[0] * size[1]
    )
    return {
        "prompt": PROMPT,
        "size": f"{width}x{height}",
        "frames": min(frames for frames in limits["frames"] if frames > 1),
        "fps": limits["default_fps"],
        "steps": 6,
        "guidance_scale": limits["default_guidance_scale"],
        "seed": 7,
    }


@pytest.fixture(scope="module")
def made(stack: Stack, request_fields: dict[str, Any]) -> bytes:
    """That video's file, made undisturbed."""
    return stack.completed(stack.order(**request_fields))


def _read(data: bytes) -> tuple[int, tuple[int, int], float]:
    """Frame count, size and frame rate of an MP4; every frame is decoded."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return len(frames), (frames[0].width, frames[0].height), float(stream.average_rate or 0)


def test_one_ready_line(stack: Stack) -> None:
    assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+\n", stack.ready_line)
    assert stack.json("GET", "/readyz")["status"] == "ready"
    members = {member["instance"] for member in stack.json("GET", "/v1/cluster")["members"]}
    workers = {"encoder-0", "dit-0", "dit-1", "vae-0", "vae-1"}
    assert members == {"gateway-0", "scheduler-0", "cache_store-0", "decode-0"} | workers


def test_every_listener_is_on_loopback(stack: Stack) -> None:
    own = [psutil.Process(stack.process.pid), *stack.processes()]
    listening = [
        connection.laddr.ip
        for process in own
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_a_video_is_the_file_that_was_ordered(made: bytes, request_fields: dict[str, Any]) -> None:
    frames, size, rate = _read(made)
    assert frames == request_fields["frames"]
    assert "{}x{}".format(*size) == request_fields["size"]
    assert rate == request_fields["fps"]


def test_the_same_request_gives_the_same_bytes(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    assert stack.completed(stack.order(**request_fields)) == made
    assert stack.completed(stack.order(**{**request_fields, "seed": 8})) != made


def test_the_stack_makes_what_one_process_makes(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    width, height = map(int, request_fields["size"].split("x"))
    arguments = {name: value for name, value in request_fields.items() if name != "size"}
    answer = subprocess.run(
        [sys.executable, "-m", "loadgen.in_process", VIDEO_MODEL, "1"],
        input=json.dumps({**arguments, "width": width, "height": height}) + "\n",
        cwd=PACKAGE_ROOT,
        capture_output=True,
        text=True,
        timeout=VIDEO_S,
        check=True,
    ).stdout.splitlines()
    assert answer[0] == "ready"
    assert json.loads(answer[1])["sha256"] == hashlib.sha256(made).hexdigest()


def test_a_negative_prompt_changes_the_video(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    assert stack.completed(stack.order(**request_fields, negative_prompt="a blue square")) != made


def test_openais_own_client(stack: Stack, request_fields: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key="any", max_retries=0, timeout=VIDEO_S) as client:
        models = [model.id for model in client.models.list()]
        video = client.videos.create(
            model=models[0],
            prompt=PROMPT,
            extra_body={name: request_fields[name] for name in ("size", "frames", "fps", "steps", "seed")},
        )
        assert video.object == "video"
        video = client.videos.poll(video.id, poll_interval_ms=50)
        assert video.status == "completed"
        assert _read(client.videos.download_content(video.id).read())[0] == request_fields["frames"]
        assert video.id in {listed.id for listed in client.videos.list()}
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


def test_several_videos_at_once(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    ordered = [stack.order(**{**request_fields, "seed": seed}) for seed in (7, 11, 12, 13, 7)]
    files = [stack.completed(video_id) for video_id in ordered]
    assert files[0] == files[4] == made
    assert len(set(files)) == 4


def _large(stack: Stack, fields: dict[str, Any]) -> dict[str, Any]:
    """A request of as much work in each step, and after the last, as there can be."""
    limits = stack.limits()
    return {**fields, "size": limits["default_size"], "frames": max(limits["frames"])}


def test_a_cancelled_video_ends(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    video_id = stack.caught(lambda video: video["step"] >= 1, **_large(stack, {**request_fields, "steps": LONG}))["id"]
    stack.call("POST", f"/v1/videos/{video_id}/cancel")
    ended_by_s = time.monotonic() + VIDEO_S
    while (video := stack.json("GET", f"/v1/videos/{video_id}"))["status"] != "failed":
        assert time.monotonic() < ended_by_s
        time.sleep(0.02)
    assert video["state"] == "cancelled"
    with pytest.raises(urllib.error.HTTPError):
        stack.call("GET", f"/v1/videos/{video_id}/content")
    assert stack.completed(stack.order(**request_fields)) == made


def _video(stack: Stack, *options: str, prompt: str = PROMPT) -> subprocess.CompletedProcess[str]:
    """``triptych video`` against the running stack."""
    return subprocess.run(
        [sys.executable, "-m", "compose.cli", "video", prompt, "--base-url", stack.base_url, *options],
        cwd=PACKAGE_ROOT,
        capture_output=True,
        text=True,
        timeout=VIDEO_S,
        check=False,
    )


def test_the_command_line_brings_video_sheet_and_timeline_home(
    stack: Stack, tmp_path: Path, request_fields: dict[str, Any], made: bytes
) -> None:
    film, sheet, timeline = tmp_path / "out" / "a.mp4", tmp_path / "a.png", tmp_path / "a.html"
    options = [f"--{name}={request_fields[name]}" for name in ("size", "frames", "fps", "steps", "seed")]
    finished = _video(stack, "-o", str(film), "--sheet", str(sheet), "--timeline", str(timeline), *options)
    assert finished.returncode == 0, finished.stderr
    assert film.read_bytes() == made
    with Image.open(sheet) as picture:
        assert picture.width > picture.height / 4
    page = timeline.read_text()
    assert page.count('<g class="span step') == request_fields["steps"]
    assert page.count('<g class="span encode') == page.count('<g class="span decode') == 1
    assert not list(tmp_path.glob("out/.*"))


def test_an_idea_is_expanded_before_its_video_is_made(
    stack: Stack, tmp_path: Path, request_fields: dict[str, Any]
) -> None:
    idea = {**request_fields, "prompt": "ball go right, red", "expand_prompt": True}
    film = stack.completed(video_id := stack.order(**idea))
    video = stack.json("GET", f"/v1/videos/{video_id}")
    caption = video["expanded_prompt"]
    subject = read_caption(caption)
    assert video["prompt"] == idea["prompt"]
    assert subject is not None
    assert (subject.colour, subject.shape, subject.action) == ("red", Shape.CIRCLE, Action.RIGHT)
    listed = stack.json("GET", "/v1/videos?limit=1")["data"][0]
    assert (listed["prompt"], listed["expanded_prompt"]) == (idea["prompt"], caption)
    assert stack.completed(stack.order(**idea)) == film, "the same idea with the same seed"
    assert stack.completed(stack.order(**{**request_fields, "prompt": caption})) == film, "what was read is the caption"

    options = [f"--{name}={request_fields[name]}" for name in ("size", "frames", "fps", "steps", "seed")]
    made_here = tmp_path / "a.mp4"
    finished = _video(stack, "-o", str(made_here), "--expand", *options, prompt=str(idea["prompt"]))
    assert finished.returncode == 0, finished.stderr
    assert f'"{idea["prompt"]}" becomes "{caption}"' in finished.stderr
    assert made_here.read_bytes() == film


def test_one_command_starts_a_stack_expands_an_idea_and_makes_its_video(tmp_path: Path) -> None:
    film = tmp_path / "a.mp4"
    command = [sys.executable, "-m", "compose.cli", "video", "ball go right, red", "--expand", "--start"]
    finished = subprocess.run(
        [*command, "--video-model", VIDEO_MODEL, "--steps", "6", "-o", str(film)],
        cwd=PACKAGE_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=START_S + VIDEO_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert '"ball go right, red" becomes "a red ' in finished.stderr
    assert _read(film.read_bytes())[0] > 1


def test_the_command_line_reports_a_refusal_in_one_line(stack: Stack, tmp_path: Path) -> None:
    finished = _video(stack, "-o", str(tmp_path / "a.mp4"), "--steps", "100000")
    assert finished.returncode == 1
    assert finished.stderr.startswith("triptych: ")
    assert "steps" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


def test_the_timeline_says_who_did_what(stack: Stack, request_fields: dict[str, Any]) -> None:
    video_id = stack.order(**request_fields)
    stack.completed(video_id)
    body = stack.json("GET", f"/v1/videos/{video_id}/timeline")
    spans = VideoTimeline.model_validate({"job_id": body["id"], "spans": body["spans"]}).spans
    assert [span.phase for span in spans].count("encode") == 1
    assert [span.step for span in spans if span.phase == "step"] == list(range(1, request_fields["steps"] + 1))
    slot = {span.slot for span in spans if span.phase in ("step", "decode")}
    assert len(slot) == 1, "one slot denoises and decodes"
    assert all(span.ended_at_s >= span.started_at_s for span in spans)


# --- killed in the middle ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_video(stack: Stack, request_fields: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A request that takes a while, and its file, made undisturbed."""
    fields = {**request_fields, "steps": LONG}
    return fields, stack.completed(stack.order(**fields))


@pytest.mark.parametrize(
    "victims", [["scheduler-0"], ["gateway-0"], ["nats-0"], ["encoder-0"], ["cache_store-0"]], ids="+".join
)
def test_denoising_survives_a_kill(stack: Stack, long_video: tuple[dict[str, Any], bytes], victims: list[str]) -> None:
    fields, expected = long_video
    video_id = stack.caught(lambda video: video["state"] == "denoising" and video["step"] >= 1, **fields)["id"]
    for victim in victims:
        stack.kill(victim)
    assert stack.completed(video_id) == expected
    if "cache_store-0" in victims:
        # Whoever asked the dead one waits so long for its answer before it asks its next life.
        time.sleep(STORE_DEADLINE_S + 0.5)


def test_whoever_is_killed_at_whatever_step_the_file_is_the_same(
    stack: Stack, long_video: tuple[dict[str, Any], bytes]
) -> None:
    fields, expected = long_video
    chance = random.Random(SEED)
    first = chance.randrange(len(VICTIMS))
    for run in range(KILLS):
        victim, step = VICTIMS[(first + run) % len(VICTIMS)], chance.randrange(LONG)
        video_id = stack.order_and_kill(fields, victim, step, chance.random() * 0.1)
        said = f"seed {SEED}, run {run}: {victim} killed at step {step}"
        assert stack.completed(video_id) == expected, said
        spans = stack.json("GET", f"/v1/videos/{video_id}/timeline")["spans"]
        steps = [span["step"] for span in spans if span["phase"] == "step"]
        # What a scheduler has seen is lost with it; what is left is still each step once.
        assert sorted(set(steps)) == sorted(steps), said
        assert victim in ("scheduler-0", "nats-0") or len(steps) == LONG, said
        stack.wait_whole()


@pytest.mark.parametrize("victims", [["dit-0", "dit-1"], ["dit-0", "dit-1", "cache_store-0"]], ids="+".join)
def test_denoising_goes_on_from_the_checkpoint(
    stack: Stack, long_video: tuple[dict[str, Any], bytes], victims: list[str]
) -> None:
    fields, expected = long_video
    video = stack.caught(lambda video: video["state"] == "denoising" and video["step"] >= LONG // 2, **fields)
    video_id, seen = video["id"], video["step"]
    for victim in victims:
        stack.kill(victim)
    killed_at_s = time.time()
    shown: list[int] = []

    def goes_on(video: dict[str, Any]) -> bool:
        shown.append(video["step"])
        return video["status"] == "completed"

    stack.wait(video_id, goes_on)
    assert stack.call("GET", f"/v1/videos/{video_id}/content") == expected
    assert min(shown) >= seen - LOST, "what is shown never goes back further than the checkpoint"
    spans = stack.json("GET", f"/v1/videos/{video_id}/timeline")["spans"]
    kept = [span["step"] for span in spans if span["phase"] == "step" and span["ended_at_s"] <= killed_at_s]
    assert len(kept) >= seen - LOST, "what was done is not done again"
    assert sorted(span["step"] for span in spans if span["phase"] == "step") == list(range(1, LONG + 1))


def test_one_lost_dit_worker_leaves_the_other_video_alone(
    stack: Stack, long_video: tuple[dict[str, Any], bytes]
) -> None:
    fields, expected = long_video
    for _ in range(5):
        ordered = [stack.order(**fields), stack.order(**fields)]
        for video_id in ordered:
            stack.wait(video_id, lambda video: video["step"] >= 1)
        stack.kill("dit-0")
        states = [stack.json("GET", f"/v1/videos/{video_id}")["state"] for video_id in ordered]
        in_time = not {"decoding", "completed"} & set(states)
        assert [stack.completed(video_id) == expected for video_id in ordered] == [True, True]
        attempts = sorted(stack.json("GET", f"/v1/videos/{video_id}")["attempt"] for video_id in ordered)
        assert attempts == [1, 2] or not in_time
        if in_time:
            return
        stack.wait_whole()
    raise AssertionError("every video was done before the kill")


def test_decoding_survives_a_kill(stack: Stack, request_fields: dict[str, Any]) -> None:
    fields = _large(stack, request_fields)
    expected = stack.completed(stack.order(**fields))
    for _ in range(5):
        video_id = stack.caught(lambda video: video["state"] == "decoding", **fields)["id"]
        killed_at_s = time.time()
        for victim in ("vae-0", "vae-1"):
            stack.kill(victim)
        assert stack.completed(video_id) == expected
        if (attempt := stack.json("GET", f"/v1/videos/{video_id}")["attempt"]) > 1:
            break
        # Decoded before the kill.
        stack.wait_whole()
    # The second attempt may be granted to the other decoder before its death is known.
    assert attempt in (2, 3)
    spans = stack.json("GET", f"/v1/videos/{video_id}/timeline")["spans"]
    again = [span["step"] for span in spans if span["phase"] == "step" and span["started_at_s"] > killed_at_s]
    assert again == [], "the final latent was kept"


def test_a_killed_encoder_delays_a_video_and_no_more(stack: Stack, made: bytes, request_fields: dict[str, Any]) -> None:
    stack.kill("encoder-0")
    assert stack.completed(stack.order(**request_fields)) == made


# --- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_nothing_is_left_and_what_was_stored_stays(tmp_path: Path, long_video: tuple[dict[str, Any], bytes]) -> None:
    """Ctrl-C first, then, on the same state, kill -9 of the supervisor; a third stack goes on where that one was."""
    long_fields, expected = long_video
    before = posix_shared_memory()
    with running_stack("--state-dir", str(tmp_path)) as stack:
        limits = stack.limits()
        fields = {"prompt": PROMPT, "seed": 7, "steps": limits["steps"][0], "size": limits["sizes"][0]}
        video_id = stack.order(**fields)
        data = stack.completed(video_id)
        processes = stack.processes()
        assert len(processes) >= 11
        assert system_v_shared_memory(processes), "UCX has shared memory while the stack runs"
        assert stack.stop(signal.SIGINT) == 0
        assert psutil.wait_procs(processes, timeout=60)[1] == []
    assert system_v_shared_memory(processes) == []
    assert posix_shared_memory() <= before
    with running_stack("--state-dir", str(tmp_path)) as stack:
        assert stack.call("GET", f"/v1/videos/{video_id}/content") == data
        video_id = stack.order(**long_fields)
        seen = stack.wait(video_id, lambda video: video["step"] >= LONG // 2)["step"]
        processes = stack.processes()
        stack.process.kill()
        assert psutil.wait_procs(processes, timeout=60)[1] == []
    assert system_v_shared_memory(processes) == []
    assert posix_shared_memory() <= before
    with running_stack("--state-dir", str(tmp_path)) as stack:
        assert stack.completed(video_id) == expected
        logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("dit-*.log"))
    resumed = re.findall(r'"going on from a checkpoint".* step=(\d+)', logs)
    assert [int(step) >= seen - LOST for step in resumed] == [True], resumed


CAPTIONS = {"ball go right, red": "a red ball going right", "star spin green": "a green star spinning"}


def test_chats_beside_videos_outlive_their_instance(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key="none", max_retries=0, timeout=VIDEO_S) as client:
        model = next(model.id for model in client.models.list() if "language" in model.id)
        for killed in (False, True):
            for idea, caption in CAPTIONS.items():
                chunks = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": idea}], temperature=0, stream=True
                )
                text = ""
                for chunk in chunks:
                    first = not text
                    text += chunk.choices[0].delta.content or ""
                    if killed and first and text:
                        stack.kill("decode-0")
                assert text == caption
