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
    LanguageLimits,
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
    return json_response(ModelList(data=_models(request.app[EDGE])))


async def retrieve_model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    found = next((model for model in _models(request.app[EDGE]) if model.id == name), None)
    if found is None:
        raise ApiError(
            404,
            f"There is no model {name[:80]!r}. GET /v1/models lists those there are.",
            code="model_not_found",
            param="model",
        )
    return json_response(found)


async def cluster(request: web.Request) -> web.Response:
    edge = request.app[EDGE]
    members = _members(edge)
    depth = await edge.bus.queue_depth(VIDEO_JOBS, deadline_s=edge.settings.bus_deadline_s)
    missing = _missing(edge)
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
    missing = _missing(edge)
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


def _missing(edge: Edge) -> list[str]:
    return catalogue.missing(_members(edge), edge.bus.connected, edge.language is not None)


def _models(edge: Edge) -> list[Model]:
    languages = edge.catalogue.language_models.values() if edge.language is not None else ()
    return [
        *(_model(info) for info in edge.catalogue.video_models.values()),
        *(
            Model(
                id=info.name,
                created=info.created_at_s,
                kind="language",
                language=LanguageLimits(context_tokens=info.context_tokens),
            )
            for info in languages
        ),
    ]


def _members(edge: Edge) -> list[Member]:
    return sorted(edge.members().values(), key=lambda member: (member.service, member.slot or 0, member.instance))


def _member(member: Member) -> ClusterMember:
    model = member.video_model or member.language_model
    return ClusterMember(
        instance=member.instance,
        service=member.service,
        state=member.state,
        host=member.host,
        slot=member.slot,
        device=member.device,
        model=model.name if model is not None else None,
        started_at_s=member.started_at_s,
        roles=list(member.roles),
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
        kind="video",
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
