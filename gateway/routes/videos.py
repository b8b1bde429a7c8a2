"""Create, list, retrieve, cancel and delete videos, and what was done where."""

import secrets
import time
from collections.abc import Mapping

from aiohttp import web

from common.messages.cluster import VideoModelInfo
from common.messages.video import VideoState
from gateway import catalogue, present
from gateway.bodies import parse_fields, read_fields
from gateway.desk import place_of
from gateway.edge import EDGE, Edge
from gateway.errors import ApiError, invalid, try_again
from gateway.expansion import expand
from gateway.ledger import Place
from gateway.routing import json_response
from gateway.schemas import CreateVideo, Span, Timeline, Video, VideoDeleted, VideoList
from gateway.validation import resolve

_FORM_NUMBERS = frozenset({"seed", "steps", "guidance_scale", "frames", "fps", "priority", "deadline"})
_FORM_FLAGS = frozenset({"expand_prompt"})
_UNSUPPORTED = {
    "input_reference": "videos are made from text alone. Leave it out and describe the picture in 'prompt'.",
    "input_references": "videos are made from text alone. Leave it out and describe the picture in 'prompt'.",
    "characters": "there are no characters here. Leave it out and describe them in 'prompt'.",
    "n": "each request makes one video. Leave it out and send as many requests as you want videos.",
}
_RANDOM_SEEDS = 2**32
_DEFAULT_PAGE = 20
_LARGEST_PAGE = 100
_POLL_AFTER_MS = (200, 5000)


async def create_video(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    if edge.draining.is_set():
        raise try_again(
            "This server is shutting down and takes no new videos.", "draining", edge.settings.retry_after_s
        )
    fields = await read_fields(request, edge.settings.body_deadline_s, _FORM_NUMBERS, _FORM_FLAGS)
    asked = parse_fields(CreateVideo, fields, _UNSUPPORTED)
    model = _model(edge, asked.model)
    resolved = resolve(asked, model, secrets.randbelow(_RANDOM_SEEDS), time.time())
    if asked.expand_prompt:
        # Before anything is stored, so that whoever makes the video, at whatever attempt, reads the same caption.
        caption = await expand(edge, resolved.prompt, model)
        resolved = resolved.model_copy(update={"expanded_prompt": caption})
    record = await edge.work.finish(edge.desk.create(resolved))
    return json_response(present.video(record, None))


async def list_videos(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    _only(request.query, ("limit", "after", "order"))
    if not edge.bus.connected:
        raise try_again(
            "The message broker is not reachable, so the list may be out of date.",
            "broker_unavailable",
            edge.settings.retry_after_s,
        )
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", f"'order' must be 'asc' or 'desc', not {order[:40]!r}.")
    page = edge.ledger.page(
        _after(edge, request.query.get("after")), _limit(request.query.get("limit")), order == "desc"
    )
    snapshots = [edge.ledger.with_progress(record) for record in page.records]
    data = [present.video(snapshot.record, snapshot.progress) for snapshot in snapshots]
    return json_response(
        VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=page.has_more,
        )
    )


async def retrieve_video(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    record = (await edge.desk.find(request.match_info["video_id"])).value
    video = present.video(record, edge.ledger.with_progress(record).progress)
    return json_response(video, headers=_poll_hint(video))


async def cancel_video(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    record = await edge.work.finish(edge.desk.cancel(request.match_info["video_id"]))
    return json_response(present.video(record, None))


async def delete_video(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    video_id = request.match_info["video_id"]
    await edge.work.finish(edge.desk.delete(video_id))
    return json_response(VideoDeleted(id=video_id))


async def video_timeline(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    record = (await edge.desk.find(request.match_info["video_id"])).value
    timeline = await edge.desk.timeline(record)
    spans = [Span.model_validate(span.model_dump()) for span in timeline.spans]
    return json_response(Timeline(id=record.job_id, spans=spans))


async def unsupported_operation(request: web.Request) -> web.Response:
    raise ApiError(
        404,
        f"{request.method} {request.path} is not supported: videos are made from text alone, by POST /v1/videos.",
        code="unsupported_operation",
    )


def _model(edge: Edge, name: str | None) -> VideoModelInfo:
    models = edge.catalogue.video_models
    if not models:
        lacking = ", ".join(catalogue.missing(edge.members().values(), edge.bus.connected))
        raise try_again(
            f"No video model is ready yet; waiting for {lacking}.", "not_ready", edge.settings.retry_after_s
        )
    if name is None:
        if len(models) == 1:
            return next(iter(models.values()))
        raise invalid("model", f"'model' is missing; there are {', '.join(models)}.", "missing_field")
    if name not in models:
        raise ApiError(
            404,
            f"There is no video model {name[:80]!r}; there is {', '.join(models)}. Without 'model' it is the only one.",
            code="model_not_found",
            param="model",
        )
    return models[name]


def _only(query: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in query:
        if name not in known:
            raise invalid(
                name[:80], f"Unknown query parameter {name[:80]!r}. Known are {', '.join(known)}.", "unknown_field"
            )


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_PAGE
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:10]) <= _LARGEST_PAGE:
        raise invalid("limit", f"'limit' must be an integer from 1 to {_LARGEST_PAGE}, not {text[:40]!r}.")
    return int(text)


def _after(edge: Edge, video_id: str | None) -> Place | None:
    """The place behind which the page begins. A video deleted since still has one, so that whoever deletes while
    listing gets to see every video."""
    if video_id is None:
        return None
    place = edge.ledger.place(video_id) or place_of(video_id)
    if place is None:
        raise invalid("after", f"'after' must be the id of a video in the list, not {video_id[:80]!r}.")
    return place


def _poll_hint(video: Video) -> dict[str, str]:
    """When it is worth asking again; OpenAI's SDKs read this header."""
    if video.state in (VideoState.COMPLETED, VideoState.FAILED, VideoState.CANCELLED):
        return {}
    least, most = _POLL_AFTER_MS
    expected_ms = 500 if video.estimate_s is None else int(video.estimate_s * 1000 / 4)
    return {"openai-poll-after-ms": str(min(max(expected_ms, least), most))}
