"""The aiohttp application: the route table, and what happens around every request."""

import time
from importlib.metadata import PackageNotFoundError, version
from uuid import uuid4

import structlog
from aiohttp import web

from common.bus.errors import BusError
from gateway import errors, openapi
from gateway.edge import EDGE, Edge
from gateway.errors import ApiError
from gateway.routes.stack import DOCUMENT
from gateway.routing import Handler
from gateway.table import ROUTES

log = structlog.get_logger()

_REQUEST_ID = web.RequestKey("request_id", str)
_BEGUN = web.RequestKey("begun", web.StreamResponse)
# What a client that leaves before its answer counts as, in metrics.
_CLIENT_LEFT = 499


def make_app(edge: Edge) -> web.Application:
    """The application of one gateway."""
    app = web.Application(client_max_size=edge.settings.max_body_bytes, middlewares=[_measured, _answered])
    app.on_response_prepare.append(_began)
    app[EDGE] = edge
    app[DOCUMENT] = openapi.describe(ROUTES, "Triptych", _version())
    for route in ROUTES:
        app.router.add_route(route.method, route.pattern or route.path, route.handler)
        if route.method == "GET":
            app.router.add_route("HEAD", route.pattern or route.path, route.handler)
    return app


@web.middleware
async def _measured(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count and log every request, those included whose client leaves."""
    edge = request.app[EDGE]
    began_s = time.monotonic()
    status, streamed = _CLIENT_LEFT, False
    try:
        response = await handler(request)
        status, streamed = response.status, response.content_type == "text/event-stream"
        return response
    finally:
        duration_s = time.monotonic() - began_s
        edge.metrics.request_ended(request.method, _template(request), status, duration_s, streamed)
        log.debug("request", method=request.method, path=request.path, status=status, duration_s=round(duration_s, 4))


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an error object. Traces go to the log, never to the client."""
    request_id = uuid4().hex
    retry_after_s = request.app[EDGE].settings.retry_after_s
    request[_REQUEST_ID] = request_id
    try:
        _refuse_other_sites(request)
        return await handler(request)
    except ApiError as error:
        response = error.response()
    except BusError as error:
        refusal = errors.of_bus(error, retry_after_s)
        log.warning("request failed on the bus", request=request_id, path=request.path, reason=str(error))
        response = refusal.response()
    except web.HTTPException as error:
        response = errors.of_http(error, request.method, request.path).response()
    except TimeoutError:
        log.warning("request took too long", request=request_id, path=request.path)
        response = errors.try_again("The server could not answer in time.", "timeout", retry_after_s).response()
    except ConnectionError:
        # The client has left: there is nobody to answer.
        response = web.Response(status=400)
    except Exception as error:
        log.error("request failed", request=request_id, path=request.path, exc_info=error)
        response = errors.internal().response()
    return _broken_off(request) or response


def _broken_off(request: web.Request) -> web.StreamResponse | None:
    """Where an answer had begun, nothing can be said any more: the connection ends, so that the client notices."""
    begun: web.StreamResponse | None = request.get(_BEGUN)
    if begun is not None and request.transport is not None:
        request.transport.abort()
    return begun


async def _began(request: web.Request, response: web.StreamResponse) -> None:
    """OpenAI's SDKs show this id with an error; the log has it too."""
    request[_BEGUN] = response
    response.headers["Server"] = "triptych"
    if _REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[_REQUEST_ID]


def _refuse_other_sites(request: web.Request) -> None:
    """A page of another site must not use a visitor's browser to order or cancel videos on this machine."""
    if request.method not in ("GET", "HEAD") and request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise ApiError(403, "Requests from pages of other sites are not taken.", code="cross_site")


def _template(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


def _version() -> str:
    try:
        return version("triptych")
    except PackageNotFoundError:
        return "0"
