"""Everything a client can do wrong: always an error object that names the field and the remedy, never a trace."""

import asyncio
import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import yarl

from tests.component.gateway_support import Stack, ThreadedStack, stack, threaded_stack, until
from tests.support.nats_server import NatsServer

MAX_BODY_BYTES = 64 * 1024


@pytest.fixture(scope="module")
def threaded() -> Iterator[ThreadedStack]:
    with threaded_stack(max_body_bytes=MAX_BODY_BYTES, body_deadline_s=60.0) as running:
        yield running


async def ask(running: ThreadedStack, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
    async with running.stack.http.request(method, yarl.URL(path, encoded=True), **options) as response:
        return response.status, await response.json(), response.headers


def checked_error(status: int, body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "Traceback" not in json.dumps(body)
    return error


BAD_FIELDS: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({}, 400, "missing_field", "prompt", "required"),
    ({"prompt": ""}, 400, "empty_prompt", "prompt", "empty"),
    ({"prompt": "a \ud800 circle"}, 400, "not_unicode", "prompt", "surrogate"),
    ({"prompt": 5}, 400, "invalid_type", "prompt", "must be a string"),
    ({"prompt": "x" * 1000}, 400, "prompt_too_long", "prompt", "at most 32 tokens"),
    ({"prompt": "x", "model": "sora-2"}, 404, "model_not_found", "model", "there is demo"),
    ({"prompt": "x", "model": ""}, 404, "model_not_found", "model", "there is demo"),
    ({"prompt": "x", "model": 1}, 400, "invalid_type", "model", "must be a string"),
    ({"prompt": "x", "size": "1280x720"}, 400, "unsupported_size", "size", "64x64, 96x64"),
    ({"prompt": "x", "size": [64, 64]}, 400, "invalid_type", "size", "must be a string"),
    ({"prompt": "x", "frames": 15}, 400, "unsupported_frames", "frames", "8, 16, 17"),
    ({"prompt": "x", "frames": 8, "seconds": 2}, 400, "contradictory_fields", "seconds", "one of the two"),
    ({"prompt": "x", "seconds": "12"}, 400, "unsupported_seconds", "seconds", "1 s (8 frames)"),
    ({"prompt": "x", "seconds": {}}, 400, "invalid_type", "seconds", "a string or an integer or a number"),
    ({"prompt": "x", "fps": 1000}, 400, "unsupported_fps", "fps", "from 4 to 24"),
    ({"prompt": "x", "steps": 10**30}, 400, "unsupported_steps", "steps", "from 1 to 50"),
    ({"prompt": "x", "steps": "ten"}, 400, "invalid_type", "steps", "must be an integer"),
    ({"prompt": "x", "guidance_scale": 100}, 400, "unsupported_guidance_scale", "guidance_scale", "from 0 to 20"),
    ({"prompt": "x", "seed": -1}, 400, "invalid_value", "seed", "greater than or equal to 0"),
    ({"prompt": "x", "priority": 1000}, 400, "invalid_value", "priority", "from -100 to 100"),
    ({"prompt": "x", "priority": "high"}, 400, "invalid_type", "priority", "must be an integer"),
    ({"prompt": "x", "deadline": -1}, 400, "invalid_value", "deadline", "above 0"),
    ({"prompt": "x", "deadline": "soon"}, 400, "invalid_type", "deadline", "must be a number"),
    ({"prompt": "x", "expand_prompt": "yes"}, 400, "invalid_type", "expand_prompt", "must be true or false"),
    ({"prompt": "x", "expand_prompt": True}, 400, "no_language_model", "expand_prompt", "start the stack with one"),
    ({"prompt": "x", "steps": 10**400}, 400, "unsupported_steps", "steps", "from 1 to 50"),
    ({"prompt": "x", "sise": "64x64"}, 400, "unknown_field", "sise", "Did you mean 'size'?"),
    ({"prompt": "x", "Prompt": "x"}, 400, "unknown_field", "Prompt", "Did you mean 'prompt'?"),
    ({"prompt": "x", "num_frames": 8}, 400, "unknown_field", "num_frames", "Did you mean 'frames'?"),
    ({"prompt": "x", "input_reference": {"image_url": "x"}}, 400, "unsupported_field", "input_reference", "text alone"),
    ({"prompt": "x", "n": 2}, 400, "unsupported_field", "n", "one video"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param", "says"), BAD_FIELDS)
def test_fields_that_do_not_fit(
    threaded: ThreadedStack, fields: dict[str, Any], status: int, code: str, param: str, says: str
) -> None:
    got, body, _ = threaded.run(ask(threaded, "POST", "/v1/videos", json=fields))
    assert got == status, body
    error = checked_error(status, body)
    assert (error["code"], error["param"]) == (code, param)
    assert says in error["message"]


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BAD_BODIES: list[tuple[bytes, dict[str, str], int, str]] = [
    (b"", JSON, 400, "empty_body"),
    (b"{", JSON, 400, "bad_json"),
    (b"[1]", JSON, 400, "bad_json"),
    (b"null", JSON, 400, "bad_json"),
    (b'{"prompt": "x",}', JSON, 400, "bad_json"),
    (b'{"prompt": "x", "seed": NaN}', JSON, 400, "bad_json"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "bad_json"),
    (b'{"prompt": "x", "prompt": "y"}', JSON, 400, "duplicate_field"),
    (b'{"prompt": "\\ud800"}', JSON, 400, "not_unicode"),
    (b'{"\\ud800": "x"}', JSON, 400, "unknown_field"),
    (b'{"prompt": "\xff"}', JSON, 400, "bad_json"),
    (b"[" * 60_000, JSON, 400, "bad_json"),
    (b"{" + b" " * MAX_BODY_BYTES + b"}", JSON, 413, "body_too_large"),
    (gzip.compress(b" " * 10_000_000), JSON | {"Content-Encoding": "gzip"}, 413, "body_too_large"),
    (b"not gzip", JSON | {"Content-Encoding": "gzip"}, 400, "bad_body"),
    (b"<prompt>x</prompt>", {"Content-Type": "application/xml"}, 415, "unsupported_media_type"),
    (b"prompt=x&prompt=y", FORM, 400, "duplicate_field"),
    (b"prompt=x&seed=seven", FORM, 400, "invalid_type"),
    (b"prompt=x&seed=1e400", FORM, 400, "invalid_type"),
    (b"prompt=x&sise=64x64", FORM, 400, "unknown_field"),
    (b"prompt=%FF", FORM, 400, "bad_form"),
    (b"prompt=" + b"x" * MAX_BODY_BYTES, FORM, 413, "body_too_large"),
    (b"--b\r\nhm", {"Content-Type": "multipart/form-data; boundary=b"}, 400, "bad_form"),
    (b"--b\r\n\r\n", {"Content-Type": "multipart/form-data"}, 400, "bad_form"),
    (b"x", {"Content-Type": "multipart/form-data; boundary=b"}, 400, "bad_form"),
]


@pytest.mark.parametrize(("data", "headers", "status", "code"), BAD_BODIES)
def test_bodies_that_cannot_be_read(
    threaded: ThreadedStack, data: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    got, body, _ = threaded.run(ask(threaded, "POST", "/v1/videos", data=data, headers=headers))
    assert got == status, body
    assert checked_error(status, body)["code"] == code


def test_a_file_where_text_belongs_is_refused(threaded: ThreadedStack) -> None:
    form = aiohttp.FormData()
    form.add_field("prompt", b"a red ball", filename="prompt.txt")
    status, body, _ = threaded.run(ask(threaded, "POST", "/v1/videos", data=form))
    assert status == 400
    error = checked_error(status, body)
    assert (error["param"], error["code"]) == ("prompt", "invalid_type")


BAD_ROUTES = [
    ("GET", "/v1/video", 404, "unknown_route"),
    ("GET", "/v1/videos/", 404, "unknown_route"),
    ("GET", "/nothing/../etc/passwd", 404, "unknown_route"),
    ("GET", "/studio.py", 404, "unknown_route"),
    ("PUT", "/v1/videos", 405, "method_not_allowed"),
    ("PATCH", "/v1/videos/video_1", 405, "method_not_allowed"),
    ("POST", "/readyz", 405, "method_not_allowed"),
    ("GET", "/v1/videos/video_1/cancel", 405, "method_not_allowed"),
    ("POST", "/v1/videos/edits", 404, "unsupported_operation"),
    ("POST", "/v1/videos/video_1/remix", 404, "unsupported_operation"),
    ("GET", "/v1/models/sora-2", 404, "model_not_found"),
    ("GET", "/v1/videos?limit=0", 400, "invalid_value"),
    ("GET", "/v1/videos?limit=101", 400, "invalid_value"),
    ("GET", "/v1/videos?limit=ten", 400, "invalid_value"),
    ("GET", "/v1/videos?limit=%D9%A3", 400, "invalid_value"),
    ("GET", "/v1/videos?order=up", 400, "invalid_value"),
    ("GET", "/v1/videos?after=video_1", 400, "invalid_value"),
    ("GET", "/v1/videos?lmit=3", 400, "unknown_field"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), BAD_ROUTES)
def test_routes_and_queries_that_do_not_exist(
    threaded: ThreadedStack, method: str, path: str, status: int, code: str
) -> None:
    got, body, headers = threaded.run(ask(threaded, method, path))
    assert got == status, body
    assert checked_error(status, body)["code"] == code
    if status == 405:
        assert headers["Allow"]


IDS = ["video_1", "video_" + "0" * 32, "..%2F..%2Fetc", "*", ">", "a.b", "%00", "%20", "%F0%9F%8E%AC", "x" * 4000]


@pytest.mark.parametrize("video_id", IDS)
@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/content"),
        ("GET", "/events"),
        ("GET", "/timeline"),
        ("POST", "/cancel"),
    ],
)
def test_ids_of_nothing(threaded: ThreadedStack, video_id: str, method: str, part: str) -> None:
    got, body, _ = threaded.run(ask(threaded, method, f"/v1/videos/{video_id}{part}"))
    assert got == 404
    error = checked_error(got, body)
    assert (error["code"], error["param"]) == ("video_not_found", "video_id")


def test_an_unknown_variant_or_parameter_of_content(threaded: ThreadedStack) -> None:
    for query, param in (("variant=gif", "variant"), ("varient=video", "varient")):
        got, body, _ = threaded.run(ask(threaded, "GET", f"/v1/videos/video_1/content?{query}"))
        assert got == 400
        assert checked_error(got, body)["param"] == param


async def test_a_body_that_never_ends_is_given_up(nats_server: NatsServer) -> None:
    async with stack(nats_server, body_deadline_s=0.5) as s, asyncio.timeout(60):
        host, port = s.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        answer = await reader.readuntil(b"body_timeout")
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 408")


def test_what_is_not_http_gets_no_trace_either(threaded: ThreadedStack) -> None:
    host, port = threaded.stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60.0) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b""
        while more := connection.recv(65536):
            answer += more
    assert b" 400 " in answer
    assert b"Traceback" not in answer


def test_a_page_of_another_site_may_look_but_not_order(threaded: ThreadedStack) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    status, body, _ = threaded.run(ask(threaded, "POST", "/v1/videos", data={"prompt": "x"}, headers=headers))
    assert status == 403
    assert checked_error(status, body)["code"] == "cross_site"
    assert threaded.run(ask(threaded, "GET", "/healthz", headers=headers))[0] == 200


def test_nothing_of_all_this_made_a_video(threaded: ThreadedStack) -> None:
    for fields, *_ in BAD_FIELDS:
        threaded.run(ask(threaded, "POST", "/v1/videos", json=fields))
    assert threaded.run(ask(threaded, "GET", "/v1/videos"))[1]["data"] == []


async def test_before_a_model_is_there_creates_are_told_what_is_waited_for(nats_server: NatsServer) -> None:
    async with stack(nats_server, services=()) as s, s.http.post("/v1/videos", json={"prompt": "x"}) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        error = checked_error(503, await response.json())
        assert "scheduler, encoder, dit, vae" in error["message"]


async def test_while_the_broker_is_away_requests_are_told_to_come_back(nats_server: NatsServer) -> None:
    async with stack(nats_server, bus_deadline_s=0.3) as s:
        video_id = (await patiently(s, "POST", "/v1/videos", json={"prompt": "x"}))["id"]
        await nats_server.kill()
        await until(lambda: notices(s))
        for method, path, options in (
            ("POST", "/v1/videos", {"json": {"prompt": "x"}}),
            ("GET", f"/v1/videos/{video_id}", {}),
            ("GET", f"/v1/videos/{video_id}/content", {}),
            ("GET", f"/v1/videos/{video_id}/events", {}),
            ("DELETE", f"/v1/videos/{video_id}", {}),
            ("POST", f"/v1/videos/{video_id}/cancel", {}),
            ("GET", "/v1/videos", {}),
            ("GET", "/v1/cluster", {}),
        ):
            async with s.http.request(method, path, **options) as response:
                assert response.status == 503, path
                assert int(response.headers["Retry-After"]) >= 1
                assert checked_error(503, await response.json())["code"] == "broker_unavailable"
        status, body = await s.call("GET", "/readyz")
        assert status == 503
        assert "broker" in body["missing"]
        assert (await s.call("GET", "/healthz"))[0] == 200
        async with s.http.get("/metrics") as response:
            assert "triptych_broker_connected 0.0" in await response.text()

        await nats_server.start()
        await patiently(s, "GET", "/readyz")
        assert (await patiently(s, "GET", f"/v1/videos/{video_id}"))["state"] == "queued"
        again = (await patiently(s, "POST", "/v1/videos", json={"prompt": "x"}))["id"]
        listed = {video["id"] for video in (await patiently(s, "GET", "/v1/videos?limit=100"))["data"]}
        assert {video_id, again} <= listed


async def notices(s: Stack) -> bool:
    """Whether the gateway knows that it has no broker."""
    return "broker" in (await s.call("GET", "/readyz"))[1]["missing"]


async def patiently(s: Stack, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The body of the first answer that is no refusal for now: on a busy machine the broker may take long to answer."""
    async with asyncio.timeout(60.0):
        while True:
            status, body = await s.call(method, path, **options)
            if status == 200:
                answered: dict[str, Any] = body
                return answered
            assert status == 503, body
            await asyncio.sleep(0.05)
