"""The stack as the gateway shows it, its own description, and the process itself."""

import asyncio
import os
import re
import signal
import socket
import sys
from typing import Any

import aiohttp
import pytest

from common.messages.cluster import Service
from common.messages.subjects import PROMPTS_SERVED
from common.messages.video import PromptSource, PromptsServed, VideoState
from tests.component.gateway_schema import SchemaMismatch, check
from tests.component.gateway_support import ALL_SERVICES, member, mp4, stack, until
from tests.support.nats_server import NatsServer, free_port


async def test_readiness_follows_the_members(nats_server: NatsServer) -> None:
    async with stack(nats_server, services=()) as s:
        assert (await s.call("GET", "/healthz")) == (200, {"status": "alive"})
        status, body = await s.call("GET", "/readyz")
        assert (status, body["missing"]) == (503, ["scheduler", "encoder", "dit", "vae"])
        async with member(s.bus, Service.SCHEDULER), member(s.bus, Service.ENCODER), member(s.bus, Service.VAE):
            async with member(s.bus, Service.DIT):
                await until(lambda: ready(s, True))
                assert (await s.call("GET", "/readyz"))[1] == {"status": "ready", "missing": [], "error": None}
            await until(lambda: ready(s, False))
            assert (await s.call("GET", "/readyz"))[1]["missing"] == ["dit"]
            # What was on offer stays so: the job waits until the worker is back.
            assert (await s.create())["status"] == "queued"


async def ready(s: Any, wanted: bool) -> bool:
    return ((await s.call("GET", "/readyz"))[0] == 200) is wanted


async def test_the_cluster_shows_members_slots_and_jobs(nats_server: NatsServer) -> None:
    async with (
        stack(nats_server, services=(Service.SCHEDULER, Service.ENCODER)) as s,
        member(s.bus, Service.DIT, "dit-0", 0),
        member(s.bus, Service.VAE, "vae-0", 0),
        member(s.bus, Service.DIT, "dit-1", 1),
    ):
        await until(lambda: ready(s, True))
        await s.create()
        done = (await s.create())["id"]
        await s.call("POST", f"/v1/videos/{done}/cancel")
        body = (await s.call("GET", "/v1/cluster"))[1]
        assert {item["instance"] for item in body["members"]} == {
            "scheduler-0",
            "encoder-0",
            "dit-0",
            "dit-1",
            "vae-0",
        }
        slots = {item["slot"]: item["members"] for item in body["slots"]}
        assert slots == {0: ["dit-0", "vae-0"], 1: ["dit-1"]}
        assert (body["ready"], body["missing"], body["queue_depth"]) == (True, [], 1)
        assert (body["videos"]["queued"], body["videos"]["cancelled"]) == (1, 1)


async def metric(s: Any, line: str) -> float | None:
    async with s.http.get("/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        found = re.search(rf"^{re.escape(line)} (\S+)$", await response.text(), re.MULTILINE)
    return float(found[1]) if found else None


async def queue_depth_is(s: Any, depth: int) -> bool:
    return await metric(s, "triptych_video_queue_depth") == depth


async def test_metrics_count_requests_by_template_and_jobs_by_state(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.create()
        await s.call("POST", f"/v1/videos/{video_id}/cancel")
        await s.call("GET", f"/v1/videos/{video_id}")
        await s.call("GET", "/no/such/route")
        assert await metric(s, 'triptych_videos{state="queued"}') == 1
        assert await metric(s, 'triptych_videos{state="cancelled"}') == 1
        # Of a broker that is slow to say it, it is not a number.
        await until(lambda: queue_depth_is(s, 1))
        assert await metric(s, 'triptych_members{service="dit",state="ready"}') == 1
        assert await metric(s, "triptych_broker_connected") == 1
        created = 'triptych_http_requests_total{method="POST",route="/v1/videos",status="200"}'
        assert await metric(s, created) == 2
        one = 'triptych_http_requests_total{method="GET",route="/v1/videos/{video_id}",status="200"}'
        assert await metric(s, one) == 1
        assert await metric(s, 'triptych_http_requests_total{method="GET",route="unknown",status="404"}') == 1
        count = 'triptych_http_request_duration_seconds_count{method="POST",route="/v1/videos"}'
        assert await metric(s, count) == 2


async def test_metrics_count_prompts_by_where_their_embeddings_came_from(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        for source, prompts in (("memory", 2), ("cache_store", 3), ("memory", 1), ("model", 1)):
            served = PromptsServed(source=PromptSource(source), prompts=prompts)
            await s.bus.publish(PROMPTS_SERVED, served, "encoder-0")
        async with asyncio.timeout(60.0):
            while await metric(s, 'triptych_prompts_served_total{source="model"}') != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await metric(s, 'triptych_prompts_served_total{source="memory"}') == 3
        assert await metric(s, 'triptych_prompts_served_total{source="cache_store"}') == 3


async def test_every_answer_is_as_openapi_json_says(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        document = (await s.call("GET", "/openapi.json"))[1]
        assert document["openapi"] == "3.1.0"
        video_id = (await s.create())["id"]
        await s.progress(video_id, VideoState.QUEUED, queue_place=1)
        finished = (await s.create())["id"]
        await s.complete(finished, mp4(frames=2))
        doomed = (await s.create())["id"]
        requests: list[tuple[str, str, str, dict[str, Any]]] = [
            ("POST", "/v1/videos", "", {"json": {"prompt": "x"}}),
            ("POST", "/v1/videos", "", {"json": {"prompt": ""}}),
            ("POST", "/v1/videos", "", {"data": b"<x/>", "headers": {"Content-Type": "text/xml"}}),
            ("GET", "/v1/videos", "", {}),
            ("GET", "/v1/videos", "?limit=0", {}),
            ("GET", "/v1/videos/{video_id}", video_id, {}),
            ("GET", "/v1/videos/{video_id}", finished, {}),
            ("GET", "/v1/videos/{video_id}", "video_nobody", {}),
            ("GET", "/v1/videos/{video_id}/timeline", finished, {}),
            ("GET", "/v1/videos/{video_id}/timeline", video_id, {}),
            ("GET", "/v1/videos/{video_id}/content", video_id, {}),
            ("POST", "/v1/videos/{video_id}/cancel", video_id, {}),
            ("POST", "/v1/videos/{video_id}/cancel", finished, {}),
            ("DELETE", "/v1/videos/{video_id}", doomed, {}),
            ("GET", "/v1/models", "", {}),
            ("GET", "/v1/models/{model}", "demo", {}),
            ("GET", "/v1/models/{model}", "nothing", {}),
            ("GET", "/v1/cluster", "", {}),
            ("GET", "/healthz", "", {}),
            ("GET", "/readyz", "", {}),
        ]
        for method, template, part, options in requests:
            path = re.sub(r"\{\w+\}", part, template) if "{" in template else template + part
            status, body = await s.call(method, path, **options)
            answer = document["paths"][template][method.lower()]["responses"][str(status)]
            check(body, answer["content"]["application/json"]["schema"], document)


def test_the_check_itself_notices_a_mismatch() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    check({"a": 1}, schema, {})
    for wrong in ({}, {"a": "1"}, {"a": True}, [], None):
        with pytest.raises(SchemaMismatch):
            check(wrong, schema, {})


async def test_the_studio_is_one_site_with_nothing_from_elsewhere(nats_server: NatsServer) -> None:
    async with stack(nats_server, services=()) as s:
        for path, kind in (("/", "text/html"), ("/studio.css", "text/css"), ("/studio.js", "text/javascript")):
            async with s.http.get(path) as response:
                assert (response.status, response.content_type) == (200, kind)
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
                text = await response.text()
                assert len(text) > 500
                # An SVG namespace is a name, not a place.
                assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


# --- the process ----------------------------------------------------------------------------------------------------


async def test_the_gateway_process_serves_without_any_model_library_and_drains(nats_server: NatsServer) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "gateway",
        env=os.environ
        | {"TRIPTYCH_NATS_URL": nats_server.url, "TRIPTYCH_PORT": str(port), "TRIPTYCH_INSTANCE": "gateway-7"},
        stderr=asyncio.subprocess.PIPE,
    )
    logs = asyncio.create_task(process.communicate())
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:

            async def alive() -> bool:
                try:
                    async with http.get("/v1/cluster") as response:
                        if response.status != 200:
                            return False
                        members = (await response.json())["members"]
                except aiohttp.ClientError:
                    return False
                return [item["instance"] for item in members] == ["gateway-7"]

            await until(alive, 120.0)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60.0):
            _, errors = await logs
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.wait([logs])
    assert process.returncode == 0
    text = errors.decode()
    imported = {line.rsplit("|", 1)[1].strip() for line in text.splitlines() if line.startswith("import time:")}
    assert "gateway.service" in imported
    assert not imported & {"torch", "diffusers", "transformers", "ucxx", "numpy.random"}
    assert "Traceback" not in text


async def test_a_port_that_is_taken_stops_the_start_with_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            env=os.environ | {"TRIPTYCH_PORT": port},
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(120.0):
            _, errors = await process.communicate()
    assert process.returncode == 2
    text = errors.decode()
    assert f"port {port}: Address already in use" in text
    assert "TRIPTYCH_PORT" in text
    assert "Traceback" not in text


async def test_a_setting_that_does_not_fit_stops_the_start() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        env=os.environ | {"TRIPTYCH_PORT": "eighty"},
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120.0):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "TRIPTYCH_PORT" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_every_service_that_a_video_needs_is_played_in_these_tests() -> None:
    # Without the cache store there are no checkpoints, but there are videos.
    others = {Service.GATEWAY, Service.CACHE_STORE, Service.PREFILL, Service.DECODE}
    assert set(ALL_SERVICES) == set(Service) - others
