"""The finished file, whole or in ranges, and pictures of it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

import structlog
from aiohttp import web

from common.bus.errors import ObjectDamaged, ObjectMissing
from common.messages.subjects import VIDEO_FILES
from common.messages.video import VideoFile, VideoRecord
from gateway import present
from gateway.edge import EDGE, Edge
from gateway.errors import DO_NOT_RETRY, ApiError, invalid
from gateway.previews import PreviewFailed, Variant
from gateway.ranges import Unsatisfiable, byte_range

log = structlog.get_logger()

_VARIANTS = ("video", "thumbnail", "spritesheet")
_PREVIEW_DEADLINE_S = 60.0


async def video_content(request: web.Request) -> web.StreamResponse:
    edge = request.app[EDGE]
    variant = request.query.get("variant", "video")
    for name in request.query:
        if name != "variant":
            raise invalid(name[:80], f"Unknown query parameter {name[:80]!r}. Known is 'variant'.", "unknown_field")
    if variant not in _VARIANTS:
        raise invalid("variant", f"'variant' must be one of {', '.join(_VARIANTS)}, not {variant[:40]!r}.")
    record = (await edge.desk.find(request.match_info["video_id"])).value
    file = _file(record)
    tag = f'"{file.sha256}"' if variant == "video" else f'"{file.sha256}-{variant}"'
    headers = {
        "ETag": tag,
        # A browser may keep it, but asks whether it was deleted.
        "Cache-Control": "private, no-cache",
    }
    if _matches(request.headers.get("If-None-Match"), tag):
        return web.Response(status=304, headers=headers)
    try:
        if variant == "video":
            return await _send_video(request, edge, record, file, headers)
        return await _send_preview(edge, cast(Variant, variant), record, file, headers)
    except ObjectMissing as error:
        raise ApiError(
            404, f"The file of video {record.job_id} is no longer stored.", code="content_missing"
        ) from error
    except (ObjectDamaged, PreviewFailed) as error:
        log.error("stored file is damaged", job=record.job_id, reason=str(error))
        raise ApiError(
            500,
            f"The file of video {record.job_id} is damaged. The same request and seed make it again.",
            code="content_damaged",
            headers=DO_NOT_RETRY,
        ) from error


def _file(record: VideoRecord) -> VideoFile:
    """The finished file, or why there is none."""
    if record.file is not None:
        return record.file
    if record.state.terminal:
        failure = present.error(record)
        raise ApiError(
            404,
            f"Video {record.job_id} is {record.state} and has no content. {failure.message if failure else ''}".strip(),
            code=f"video_{record.state}",
            param="video_id",
        )
    raise ApiError(
        409,
        f"Video {record.job_id} is not finished: it is {record.state}. Wait until its status is 'completed'; "
        f"GET /v1/videos/{record.job_id}/events tells when.",
        code="video_not_ready",
        param="video_id",
        headers=DO_NOT_RETRY,
    )


async def _send_video(
    request: web.Request, edge: Edge, record: VideoRecord, file: VideoFile, headers: dict[str, str]
) -> web.StreamResponse:
    # A range of another version of the file is worthless: then the whole of this one is sent.
    stale = request.headers.get("If-Range", headers["ETag"]) != headers["ETag"]
    try:
        part = byte_range(None if stale else request.headers.get("Range"), file.size_bytes)
    except Unsatisfiable as error:
        raise ApiError(
            416,
            f"The range lies outside the file, which has {file.size_bytes} bytes.",
            code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{file.size_bytes}"},
        ) from error
    sent = range(file.size_bytes) if part is None else part
    response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
    response.content_type = "video/mp4"
    response.content_length = len(sent)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Disposition"] = f'inline; filename="{record.job_id}.mp4"'
    if part is not None:
        response.headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.size_bytes}"
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    chunks = _chunks(edge, file, sent)
    try:
        # Nothing has been promised to the client until the first bytes are here.
        first = await anext(chunks, b"")
        await response.prepare(request)
        await _write(response, first, edge.settings.write_deadline_s)
        async for chunk in chunks:
            await _write(response, chunk, edge.settings.write_deadline_s)
    finally:
        await chunks.aclose()
    return response


async def _chunks(edge: Edge, file: VideoFile, part: range) -> AsyncGenerator[bytes, None]:
    """The bytes of ``part``. The object store gives a file from its beginning, so what lies before is skipped."""
    stored = edge.bus.get_object(VIDEO_FILES, file.object_name, deadline_s=edge.settings.bus_deadline_s)
    position = 0
    try:
        async for chunk in stored:
            wanted = chunk[max(0, part.start - position) : max(0, part.stop - position)]
            position += len(chunk)
            if wanted:
                yield wanted
            if position >= part.stop and part.stop < file.size_bytes:
                return
    finally:
        await _close(stored)


async def _write(response: web.StreamResponse, chunk: bytes, deadline_s: float) -> None:
    async with asyncio.timeout(deadline_s):
        await response.write(chunk)


async def _send_preview(
    edge: Edge, variant: Variant, record: VideoRecord, file: VideoFile, headers: dict[str, str]
) -> web.Response:
    stored = edge.bus.get_object(VIDEO_FILES, file.object_name, deadline_s=edge.settings.bus_deadline_s)
    try:
        async with asyncio.timeout(_PREVIEW_DEADLINE_S):
            picture = await edge.previews.picture(variant, file.sha256, record.request.frames, stored)
    except TimeoutError as error:
        raise ApiError(
            503,
            "Too many previews are being made.",
            code="busy",
            headers={"Retry-After": str(edge.settings.retry_after_s)},
        ) from error
    finally:
        await _close(stored)
    return web.Response(body=picture, content_type="image/webp", headers=headers)


async def _close(chunks: AsyncIterator[bytes]) -> None:
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()


def _matches(header: str | None, tag: str) -> bool:
    """Whether ``If-None-Match`` names this tag."""
    if header is None:
        return False
    tags = [part.strip().removeprefix("W/") for part in header.split(",")]
    return "*" in tags or tag in tags
