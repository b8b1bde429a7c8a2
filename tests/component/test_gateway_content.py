"""The finished file: whole, in ranges, unchanged since, and as pictures."""

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from PIL import Image

from common.messages.subjects import VIDEO_FILES
from tests.component.gateway_support import Stack, ThreadedStack, mp4, stack, threaded_stack
from tests.support.nats_server import NatsServer

# Several chunks of the object store, so that ranges begin and end inside and between them.
LARGE = bytes(range(256)) * 4096


@dataclass(frozen=True)
class Served:
    threaded: ThreadedStack
    large_id: str
    film_id: str

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        async def ask() -> tuple[int, dict[str, str], bytes]:
            async with self.threaded.stack.http.request(method, path, headers=named) as response:
                return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()

        return self.threaded.run(ask())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    async def finished(s: Stack, data: bytes) -> str:
        video_id: str = (await s.create())["id"]
        await s.take()
        await s.complete(video_id, data)
        return video_id

    with threaded_stack() as threaded:
        large_id = threaded.run(finished(threaded.stack, LARGE))
        film_id = threaded.run(finished(threaded.stack, mp4(frames=16)))
        yield Served(threaded, large_id, film_id)


def test_the_whole_file(served: Served) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.large_id}/content")
    assert (status, body) == (200, LARGE)
    assert headers["content-type"] == "video/mp4"
    assert headers["content-length"] == str(len(LARGE))
    assert headers["accept-ranges"] == "bytes"
    assert headers["content-disposition"] == f'inline; filename="{served.large_id}.mp4"'


def test_its_head(served: Served) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.large_id}/content", "HEAD")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == str(len(LARGE))


CHUNK = 256 * 1024
RANGES = [
    ("0-0", 0, 1),
    ("0-99", 0, 100),
    (f"{CHUNK - 1}-{CHUNK}", CHUNK - 1, CHUNK + 1),
    (f"{CHUNK}-{2 * CHUNK - 1}", CHUNK, 2 * CHUNK),
    (f"{CHUNK // 2}-{3 * CHUNK}", CHUNK // 2, 3 * CHUNK + 1),
    (f"{len(LARGE) - 1}-", len(LARGE) - 1, len(LARGE)),
    ("-5", len(LARGE) - 5, len(LARGE)),
    ("5-999999999999", 5, len(LARGE)),
]


@pytest.mark.parametrize(("asked", "start", "end"), RANGES)
def test_ranges(served: Served, asked: str, start: int, end: int) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.large_id}/content", Range=f"bytes={asked}")
    assert status == 206
    assert body == LARGE[start:end]
    assert headers["content-range"] == f"bytes {start}-{end - 1}/{len(LARGE)}"
    assert headers["content-length"] == str(end - start)


def test_a_range_outside_the_file(served: Served) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.large_id}/content", Range=f"bytes={len(LARGE)}-")
    assert status == 416
    assert headers["content-range"] == f"bytes */{len(LARGE)}"
    assert b'"range_not_satisfiable"' in body


def test_what_is_unchanged_is_not_sent_again(served: Served) -> None:
    path = f"/v1/videos/{served.large_id}/content"
    tag = served.get(path, "HEAD")[1]["etag"]
    assert served.get(path, If_None_Match=tag)[0] == 304
    assert served.get(path, If_None_Match=f'"other", W/{tag}')[0] == 304
    assert served.get(path, If_None_Match='"other"')[0] == 200
    assert served.get(path, Range="bytes=0-1", If_Range=tag)[0] == 206
    assert served.get(path, Range="bytes=0-1", If_Range='"other"')[0] == 200


def test_two_files_have_two_tags(served: Served) -> None:
    tags = {
        served.get(f"/v1/videos/{video_id}/content{variant}", "HEAD")[1]["etag"]
        for video_id, variant in (
            (served.large_id, ""),
            (served.film_id, ""),
            (served.film_id, "?variant=thumbnail"),
            (served.film_id, "?variant=spritesheet"),
        )
    }
    assert len(tags) == 4


def brightness(picture: Image.Image, x: int, y: int) -> int:
    value = picture.convert("L").getpixel((x, y))
    assert isinstance(value, int)
    return value


def test_the_thumbnail_is_the_middle_frame(served: Served) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.film_id}/content?variant=thumbnail")
    assert (status, headers["content-type"]) == (200, "image/webp")
    picture = Image.open(io.BytesIO(body))
    assert picture.size == (64, 64)
    assert abs(brightness(picture, 32, 32) - 80) <= 4
    assert served.get(f"/v1/videos/{served.film_id}/content?variant=thumbnail")[2] == body


def test_the_spritesheet_has_the_frames_in_order(served: Served) -> None:
    status, headers, body = served.get(f"/v1/videos/{served.film_id}/content?variant=spritesheet")
    assert (status, headers["content-type"]) == (200, "image/webp")
    sheet = Image.open(io.BytesIO(body))
    assert sheet.size == (4 * 64, 4 * 64)
    for index in range(16):
        assert abs(brightness(sheet, index % 4 * 64 + 32, index // 4 * 64 + 32) - 10 * index) <= 4


def test_pictures_of_what_is_not_a_film(served: Served) -> None:
    status, _, body = served.get(f"/v1/videos/{served.large_id}/content?variant=thumbnail")
    assert status == 500
    assert b'"content_damaged"' in body


async def test_a_file_that_is_gone_is_said_to_be_gone(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        record = await s.complete(video_id, b"film")
        assert record.file is not None
        await s.bus.delete_object(VIDEO_FILES, record.file.object_name)
        for variant in ("video", "thumbnail"):
            status, body = await s.call("GET", f"/v1/videos/{video_id}/content?variant={variant}")
            assert (status, body["error"]["code"]) == (404, "content_missing")


async def test_before_the_end_there_is_no_content(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        async with s.http.get(f"/v1/videos/{video_id}/content") as response:
            assert response.status == 409
            assert response.headers["x-should-retry"] == "false"
            error = (await response.json())["error"]
        assert error["code"] == "video_not_ready"
        assert f"/v1/videos/{video_id}/events" in error["message"]


async def test_a_client_that_leaves_a_download_frees_it(nats_server: NatsServer) -> None:
    async with stack(nats_server) as s:
        video_id = (await s.create())["id"]
        await s.complete(video_id, LARGE * 16)
        before = len(asyncio.all_tasks())
        for _ in range(5):
            async with s.http.get(f"/v1/videos/{video_id}/content") as response:
                await response.content.readexactly(1000)
                response.close()
        async with asyncio.timeout(60.0):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - tasks end without telling
                await asyncio.sleep(0.02)
        async with s.http.get(f"/v1/videos/{video_id}/content") as response:
            assert await response.read() == LARGE * 16
