"""The way of a video through the gateway: create, list, retrieve, cancel, delete, as OpenAI's SDK and others do it."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest
import yarl

from common.bus.errors import KeyMissing, ObjectMissing
from common.bus.port import CaughtUp
from common.messages import subjects
from common.messages.cluster import Service
from common.messages.failures import Failure, Stage
from common.messages.subjects import VIDEO_FILES, VIDEO_JOBS, VIDEO_RECORDS, VIDEO_TIMELINES
from common.messages.video import VideoState
from tests.component.gateway_support import CLIENT_S, MODEL, ThreadedStack, member, mp4, stack, threaded_stack, until
from tests.support.nats_server import NatsServer

# --- create ---------------------------------------------------------------------------------------------------------


async def test_a_create_stores_the_record_and_the_job(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        created = await s.create(
            prompt="a red ball", size="96x64", seconds="1", seed=5, steps=3, negative_prompt="rain"
        )
        assert created["object"] == "video"
        assert (created["status"], created["state"], created["progress"]) == ("queued", "queued", 0)
        assert (created["size"], created["seconds"], created["frames"], created["seed"]) == ("96x64", "1", 8, 5)
        record = (await s.bus.get(VIDEO_RECORDS, created["id"])).value
        assert record.state is VideoState.QUEUED
        assert (record.request.prompt, record.request.negative_prompt) == ("a red ball", "rain")
        assert (record.request.width, record.request.height, record.request.steps) == (96, 64, 3)
        assert await s.take() == created["id"]
        assert (await s.call("GET", f"/v1/videos/{created['id']}"))[1] == created


async def test_priority_and_deadline_go_with_the_job(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        before_s = time.time()
        created = await s.create(priority=5, deadline=60)
        request = (await s.bus.get(VIDEO_RECORDS, created["id"])).value.request
        assert (created["priority"], request.priority) == (5, 5)
        assert request.deadline_s is not None and before_s + 60 <= request.deadline_s <= time.time() + 60
        assert created["deadline_at"] == request.deadline_s
        plain = await s.create()
        assert (plain["priority"], plain["deadline_at"]) == (0, None)
        status, from_form = await s.call(
            "POST", "/v1/videos", data={"prompt": "x", "priority": "-2", "deadline": "9.5"}
        )
        assert status == 200 and from_form["priority"] == -2


async def test_without_a_seed_each_video_gets_its_own_and_says_so(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        seeds = {(await s.create())["seed"] for _ in range(4)}
        assert len(seeds) == 4


@pytest.mark.parametrize("form", ["multipart", "urlencoded"])
async def test_forms_are_read_like_json(nats_server: NatsServer, form: str) -> None:
    fields = {"prompt": "ein roter Ball – ☂", "model": "demo", "size": "96x64", "seconds": "2", "seed": "9", "fps": "8"}
    fields |= {"guidance_scale": "3.5", "steps": "4"}
    async with stack(nats_server) as s:
        if form == "multipart":
            data: Any = aiohttp.FormData(default_to_multipart=True)
            for name, value in fields.items():
                data.add_field(name, value)
        else:
            data = fields
        status, created = await s.call("POST", "/v1/videos", data=data)
        assert status == 200, created
        assert created["prompt"] == fields["prompt"]
        assert (created["seed"], created["frames"], created["steps"], created["guidance_scale"]) == (9, 16, 4, 3.5)


async def test_thirty_creates_at_once_are_thirty_jobs(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        created = await asyncio.gather(*(s.create(prompt=f"ball {number}") for number in range(30)))
        ids = {video["id"] for video in created}
        assert len(ids) == 30
        assert await s.bus.queue_depth(VIDEO_JOBS) == 30
        assert {await s.take() for _ in range(30)} == ids
        listed = (await s.call("GET", "/v1/videos?limit=100"))[1]["data"]
        assert {video["id"] for video in listed} == ids


async def test_a_full_queue_refuses_with_retry_after_and_leaves_nothing_behind(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(VIDEO_JOBS, max_messages=2)
    monkeypatch.setattr(subjects, "VIDEO_JOBS", small)
    monkeypatch.setattr("gateway.desk.VIDEO_JOBS", small)
    monkeypatch.setattr("gateway.service.VIDEO_QUEUES", (small,))
    async with stack(nats_server) as s:
        kept = {(await s.create())["id"] for _ in range(2)}
        async with s.http.post("/v1/videos", json={"prompt": "one too many"}) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "2 videos wait already" in error["message"]
        assert set(await s.bus.keys(VIDEO_RECORDS)) == kept
        await s.take()
        await until(lambda: _depth_is(s.bus, 1))
        assert (await s.create())["status"] == "queued"


async def _depth_is(bus: Any, depth: int) -> bool:
    return bool(await bus.queue_depth(VIDEO_JOBS) == depth)


async def test_a_client_that_leaves_during_its_create_leaves_no_half_job(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:

        async def impatient(delay_s: float) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await s.create()
                    raise TimeoutError

        await asyncio.gather(*(impatient(number * 0.0005) for number in range(20)))
        # Some requests may be read only now; then both are made, or neither.
        await until(lambda: _no_half_jobs(s))


async def _no_half_jobs(s: Any) -> bool:
    await s.gateway.edge.work.settle(60.0)
    return bool(await s.bus.queue_depth(VIDEO_JOBS) == len(await s.bus.keys(VIDEO_RECORDS)))


# --- list -----------------------------------------------------------------------------------------------------------


async def test_pages_in_both_orders_hold_every_video_once(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        ids = [await s.store(1_000_000.0 + number // 2) for number in range(7)]
        in_order = sorted(ids, key=lambda video_id: (1_000_000.0 + ids.index(video_id) // 2, video_id))
        await until(lambda: _listed(s, 7))
        for order, expected in (("asc", in_order), ("desc", in_order[::-1])):
            seen: list[str] = []
            more: bool = True
            while more:
                after = f"&after={seen[-1]}" if seen else ""
                page = (await s.call("GET", f"/v1/videos?limit=3&order={order}{after}"))[1]
                data = [video["id"] for video in page["data"]]
                assert (page["object"], page["first_id"], page["last_id"]) == ("list", data[0], data[-1])
                seen += data
                more = page["has_more"]
            assert seen == expected


async def _listed(s: Any, count: int) -> bool:
    return len((await s.call("GET", "/v1/videos?limit=100"))[1]["data"]) == count


async def test_who_deletes_while_paging_sees_every_video(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        ids = {(await s.create())["id"] for _ in range(5)}
        seen, after = set(), ""
        while True:
            page = (await s.call("GET", f"/v1/videos?limit=2{after}"))[1]
            for video in page["data"]:
                seen.add(video["id"])
                assert (await s.call("DELETE", f"/v1/videos/{video['id']}"))[0] == 200
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert seen == ids
        assert (await s.call("GET", "/v1/videos"))[1]["data"] == []


async def test_the_list_is_bounded_by_dropping_the_oldest_ended(nats_server: NatsServer) -> None:
    async with stack(nats_server, listed_videos=3) as s:
        waiting = (await s.create())["id"]
        stored = [await s.store(time.time() + 10 + number) for number in range(5)]
        await until(lambda: _first_is(s, stored[-1]))
        listed = [video["id"] for video in (await s.call("GET", "/v1/videos"))[1]["data"]]
        assert listed == [stored[4], stored[3], waiting]
        assert (await s.call("GET", f"/v1/videos/{stored[0]}"))[0] == 200


async def _first_is(s: Any, video_id: str) -> bool:
    return bool((await s.call("GET", "/v1/videos"))[1]["first_id"] == video_id)


async def test_a_second_gateway_lists_what_the_first_took(nats_server: NatsServer) -> None:
    async with stack(nats_server) as first:
        video_id = (await first.create())["id"]
        async with stack(nats_server, services=()) as second:
            assert (await second.call("GET", "/v1/videos"))[1]["first_id"] == video_id
            assert (await second.call("POST", f"/v1/videos/{video_id}/cancel"))[0] == 200
            assert (await first.call("GET", f"/v1/videos/{video_id}"))[1]["state"] == "cancelled"


# --- cancel and delete ----------------------------------------------------------------------------------------------


async def test_cancelling_a_queued_video_takes_it_from_the_queue(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        for _ in range(2):
            status, body = await s.call("POST", f"/v1/videos/{video_id}/cancel")
            assert status == 200
            assert (body["status"], body["state"], body["error"]["code"]) == ("failed", "cancelled", "cancelled")
        assert await s.bus.queue_depth(VIDEO_JOBS) == 0


@pytest.mark.parametrize("ended", [VideoState.COMPLETED, VideoState.FAILED])
async def test_what_has_ended_cannot_be_cancelled(nats_server: NatsServer, ended: VideoState) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        if ended is VideoState.COMPLETED:
            await s.complete(video_id, b"film")
        else:
            await s.fail(video_id, Failure(stage=Stage.DIT, code="out_of_memory", message="too large"))
        status, body = await s.call("POST", f"/v1/videos/{video_id}/cancel")
        assert status == 409
        assert body["error"]["code"] == f"video_{ended}"
        assert (await s.bus.get(VIDEO_RECORDS, video_id)).value.state is ended


async def test_cancel_against_every_move_of_the_scheduler_ends_in_one_state(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        for _ in range(8):
            video_id = (await s.create())["id"]

            async def finish(job_id: str) -> None:
                await s.complete(job_id, b"film")

            results = await asyncio.gather(
                finish(video_id),
                *(s.call("POST", f"/v1/videos/{video_id}/cancel") for _ in range(3)),
                return_exceptions=True,
            )
            state = (await s.bus.get(VIDEO_RECORDS, video_id)).value.state
            answers = [answer[0] for answer in results[1:] if isinstance(answer, tuple)]
            if state is VideoState.COMPLETED:
                assert answers == [409] * 3
            else:
                assert state is VideoState.CANCELLED
                assert answers == [200] * 3


async def test_deleting_removes_record_file_and_timeline(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        record = await s.complete(video_id, b"film")
        assert record.file is not None
        assert (await s.call("GET", f"/v1/videos/{video_id}/timeline"))[1]["spans"][0]["instance"] == "dit-0"
        status, body = await s.call("DELETE", f"/v1/videos/{video_id}")
        assert (status, body) == (200, {"id": video_id, "object": "video.deleted", "deleted": True})
        with pytest.raises(KeyMissing):
            await s.bus.get(VIDEO_RECORDS, video_id)
        with pytest.raises(KeyMissing):
            await s.bus.get(VIDEO_TIMELINES, video_id)
        with pytest.raises(ObjectMissing):
            await s.bus.object_info(VIDEO_FILES, record.file.object_name)
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel")):
            status, body = await s.call(method, f"/v1/videos/{video_id}{path}")
            assert (status, body["error"]["code"]) == (404, "video_not_found")


async def test_deleting_a_running_video_cancels_it_first(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.move(video_id, VideoState.ENCODING, VideoState.DENOISING)
        states = []
        async with asyncio.timeout(60.0), s.bus.watch(VIDEO_RECORDS, video_id) as changes:
            async for change in changes:
                if isinstance(change, CaughtUp):
                    assert (await s.call("DELETE", f"/v1/videos/{video_id}"))[0] == 200
                    continue
                states.append(change.value.state if change.value else None)
                if change.value is None:
                    break
        # Between the last two, the record may be gone before the watch has read it.
        assert states in (
            [VideoState.DENOISING, VideoState.CANCELLED, None],
            [VideoState.DENOISING, None],
        )
        assert await s.bus.queue_depth(VIDEO_JOBS) == 0
        assert (await s.call("GET", "/v1/videos"))[1]["data"] == []


async def test_of_many_deletes_at_once_one_succeeds(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.complete(video_id, b"film")
        answers = await asyncio.gather(*(s.call("DELETE", f"/v1/videos/{video_id}") for _ in range(5)))
        assert sorted(status for status, _ in answers) == [200, 404, 404, 404, 404]


async def test_a_timeline_is_there_once_the_video_has_ended(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        assert (await s.call("GET", f"/v1/videos/{video_id}/timeline"))[0] == 409
        await s.call("POST", f"/v1/videos/{video_id}/cancel")
        status, body = await s.call("GET", f"/v1/videos/{video_id}/timeline")
        assert (status, body["error"]["code"]) == (404, "no_timeline")


# --- OpenAI's own SDK -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def threaded() -> Iterator[ThreadedStack]:
    with threaded_stack() as running:
        yield running


@pytest.fixture
def client(threaded: ThreadedStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{threaded.stack.url}/v1", api_key="any", max_retries=0, timeout=CLIENT_S) as made:
        yield made


async def _serve_next(s: Any, data: bytes) -> None:
    await s.complete(await s.take(), data)


def test_the_sdk_creates_polls_and_downloads(client: openai.OpenAI, threaded: ThreadedStack) -> None:
    film = mp4(frames=4)
    serving = asyncio.run_coroutine_threadsafe(_serve_next(threaded.stack, film), threaded.stack.http._loop)
    size: Any = "96x64"
    seconds: Any = "2"
    video = client.videos.create_and_poll(
        prompt="a red ball", model="demo", size=size, seconds=seconds, poll_interval_ms=20, extra_body={"seed": 3}
    )
    serving.result(60.0)
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "96x64", "2")
    assert video.completed_at is not None
    assert video.model_extra is not None
    assert video.model_extra["seed"] == 3
    assert client.videos.download_content(video.id).read() == film
    thumbnail = client.videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    assert client.videos.retrieve(video.id).id == video.id
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_sdk_pages_through_a_list(client: openai.OpenAI) -> None:
    ids = [client.videos.create(prompt=f"ball {number}").id for number in range(5)]
    page = client.videos.list(limit=2)
    assert [video.id for video in page][:5] == ids[::-1]
    for video in client.videos.list(limit=2):
        client.videos.delete(video.id)
    assert client.videos.list().data == []


def test_the_sdk_shows_what_failed(client: openai.OpenAI, threaded: ThreadedStack) -> None:
    async def fail_next() -> None:
        failure = Failure(stage=Stage.ENCODER, code="prompt_too_long", message="40 tokens, at most 32: shorten it")
        await threaded.stack.fail(await threaded.stack.take(), failure)

    serving = asyncio.run_coroutine_threadsafe(fail_next(), threaded.stack.http._loop)
    video = client.videos.create_and_poll(prompt="a red ball", poll_interval_ms=20)
    serving.result(60.0)
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.param) == ("prompt_too_long", "prompt")
    with pytest.raises(openai.NotFoundError, match="shorten it"):
        client.videos.download_content(video.id)


def test_the_sdk_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="it makes 64x64, 96x64") as bad:
        client.videos.create(prompt="a red ball", size="1280x720")
    assert (bad.value.param, bad.value.code) == ("size", "unsupported_size")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError, match="made from text alone"):
        client.videos.create(prompt="a red ball", input_reference=("ball.png", b"\x89PNG", "image/png"))
    with pytest.raises(openai.NotFoundError, match="there is demo"):
        client.videos.create(prompt="a red ball", model="sora-2")
    with pytest.raises(openai.NotFoundError, match="not supported"):
        client.videos.remix("video_1", prompt="blue")
    waiting = client.videos.create(prompt="a red ball")
    with pytest.raises(openai.ConflictError, match="not finished: it is queued"):
        client.videos.download_content(waiting.id)
    client.videos.delete(waiting.id)


def test_the_sdk_lists_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object) for model in models] == [("demo", "model")]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sora-2")


async def test_a_model_from_a_hub_is_found_by_its_name_with_a_slash(nats_server: NatsServer) -> None:
    hub = MODEL.model_copy(update={"name": "maker/video-v1"})
    async with (
        stack(nats_server, services=()) as s,
        member(s.bus, Service.ENCODER, model=hub),
        member(s.bus, Service.DIT, model=hub),
        member(s.bus, Service.VAE, model=hub),
    ):
        await until(lambda: _models_are(s, ["maker/video-v1"]))
        for path in ("maker/video-v1", "maker%2Fvideo-v1"):
            status, body = await s.call("GET", yarl.URL(f"/v1/models/{path}", encoded=True))  # type: ignore[arg-type]
            assert (status, body["id"]) == (200, "maker/video-v1")
        assert (await s.create(model="maker/video-v1"))["model"] == "maker/video-v1"


async def _models_are(s: Any, names: list[str]) -> bool:
    return [model["id"] for model in (await s.call("GET", "/v1/models"))[1]["data"]] == names
