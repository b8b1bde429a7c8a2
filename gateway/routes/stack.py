"""Models, members, health, metrics, the interface's own description, and the studio page."""

from importlib.resources import files
from typing import Any

from aiohttp import web

from common.bus.errors import BusError
from common.messages.cluster import Member, VideoModelInfo
from common.messages.subjects import VIDEO_JOBS
from gateway import catalogue
from gateway.edge import EDGE, Edge
from gateway.errors import ApiError, try_again
from gateway.routing import json_response
from gateway.schemas import (
    Cluster,
    ClusterMember,
    ClusterSlot,
    ErrorObject,
    Health,
    Model,
    ModelList,
    Readiness,
    VideoLimits,
)
from gateway.validation import size_text

DOCUMENT = web.AppKey("openapi", dict[str, Any])

_STUDIO = {"index.html": "text/html", "studio.css": "text/css", "studio.js": "text/javascript"}
_STUDIO_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
# Metrics are read often and must not wait long for a broker that is away.
_METRICS_DEADLINE_S = 1.0


async def list_models(request: web.Request) -> web.Response:
    models = request.app[EDGE].catalogue.video_models.values()
    return json_response(ModelList(data=[_model(info) for info in models]))


async def retrieve_model(request: web.Request) -> web.Response:
    models = request.app[EDGE].catalogue.video_models
    name = request.match_info["model"]
    if name not in models:
        raise ApiError(
            404,
            f"There is no model {name[:80]!r}. GET /v1/models lists those there are.",
            code="model_not_found",
            param="model",
        )
    return json_response(_model(models[name]))


async def cluster(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    members = _members(edge)
    depth = await edge.bus.queue_depth(VIDEO_JOBS, deadline_s=edge.settings.bus_deadline_s)
    missing = catalogue.missing(members, edge.bus.connected)
    return json_response(
        Cluster(
            ready=not missing,
            missing=missing,
            members=[_member(member) for member in members],
            slots=_slots(members),
            queue_depth=depth,
            videos=edge.ledger.counts,
        )
    )


async def healthz(request: web.Request) -> web.Response:
    return json_response(Health())


async def readyz(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    missing = catalogue.missing(_members(edge), edge.bus.connected)
    if edge.draining.is_set():
        missing.append("a gateway that is not shutting down")
    if not missing:
        return json_response(Readiness(status="ready", missing=[]))
    refusal = try_again(f"Waiting for {', '.join(missing)}.", "not_ready", edge.settings.retry_after_s)
    error = ErrorObject(message=refusal.message, type=refusal.kind, code=refusal.code)
    return json_response(Readiness(status="not_ready", missing=missing, error=error), 503, refusal.headers)


async def metrics(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    depth = None
    if edge.bus.connected:
        try:
            depth = await edge.bus.queue_depth(VIDEO_JOBS, deadline_s=_METRICS_DEADLINE_S)
        except BusError:
            depth = None
    text = edge.metrics.render(edge.ledger.counts, depth, _members(edge), edge.ledger.listeners, edge.bus.connected)
    return web.Response(body=text, headers={"Content-Type": edge.metrics.content_type})


async def openapi(request: web.Request) -> web.Response:
    return web.json_response(request.app[DOCUMENT])


async def studio(request: web.Request) -> web.Response:
    """The page and the two files it consists of."""
    name = request.path.strip("/") or "index.html"
    text = files("gateway.studio").joinpath(name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=_STUDIO[name], charset="utf-8", headers=_STUDIO_HEADERS)


def _members(edge: Edge) -> list[Member]:
    return sorted(edge.members().values(), key=lambda member: (member.service, member.slot or 0, member.instance))


def _member(member: Member) -> ClusterMember:
    return ClusterMember(
        instance=member.instance,
        service=member.service,
        state=member.state,
        host=member.host,
        slot=member.slot,
        device=member.device,
        model=member.video_model.name if member.video_model else None,
        started_at_s=member.started_at_s,
    )


def _slots(members: list[Member]) -> list[ClusterSlot]:
    by_slot: dict[int, list[Member]] = {}
    for member in members:
        if member.slot is not None:
            by_slot.setdefault(member.slot, []).append(member)
    return [
        ClusterSlot(
            slot=slot, host=there[0].host, device=there[0].device, members=[member.instance for member in there]
        )
        for slot, there in sorted(by_slot.items())
    ]


def _model(info: VideoModelInfo) -> Model:
    return Model(
        id=info.name,
        created=info.created_at_s,
        video=VideoLimits(
            sizes=[size_text(*size) for size in info.sizes],
            frames=list(info.frames),
            fps=info.fps,
            steps=info.steps,
            guidance_scale=info.guidance_scale,
            max_prompt_tokens=info.max_prompt_tokens,
            default_size=size_text(*info.default_size),
            default_frames=info.default_frames,
            default_fps=info.default_fps,
            default_steps=info.default_steps,
            default_guidance_scale=info.default_guidance_scale,
        ),
    )
