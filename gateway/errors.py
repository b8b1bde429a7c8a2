"""What a client is told when something is wrong: OpenAI's error object, with the field at fault and what to change."""

from collections.abc import Mapping

from aiohttp import web

from common.bus import errors as bus
from gateway.schemas import ErrorBody, ErrorObject

# OpenAI's SDKs try 408, 409, 429 and 5xx again by themselves, unless this header says not to.
DO_NOT_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer other than success.

    ``message`` names the remedy, ``param`` the field at fault, ``code`` is for machines.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's error type for this status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(error=ErrorObject(message=self.message, type=self.kind, param=self.param, code=self.code))

    def response(self) -> web.Response:
        return web.Response(
            status=self.status,
            text=self.body.model_dump_json(),
            content_type="application/json",
            headers=self.headers,
        )


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be carried out as it is."""
    return ApiError(400, message, code=code, param=param)


def video_not_found(video_id: str) -> ApiError:
    return ApiError(
        404,
        f"There is no video {video_id[:80]!r}: it was deleted or never made. GET /v1/videos lists those there are.",
        code="video_not_found",
        param="video_id",
    )


def try_again(message: str, code: str, retry_after_s: int) -> ApiError:
    """503: nothing is wrong with the request; the same one may succeed later."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def of_bus(error: bus.BusError, retry_after_s: int) -> ApiError:
    """What a failure of the bus means to a client. Details stay in the log."""
    match error:
        case bus.StorageFull():
            return ApiError(
                507,
                "The server's storage is full and nothing was stored. Delete videos that are no longer needed.",
                code="storage_full",
                headers=DO_NOT_RETRY,
            )
        case bus.BusUnavailable() | bus.DeadlineExceeded():
            return try_again(
                "The message broker is not reachable at the moment. Try again shortly; if this was a create, look at "
                "GET /v1/videos first.",
                "broker_unavailable",
                retry_after_s,
            )
        case _:
            return internal()


def internal() -> ApiError:
    return ApiError(
        500,
        "The server met an unexpected condition; its log holds the details under this request's id.",
        code="internal",
    )


def of_http(error: web.HTTPException, method: str, path: str) -> ApiError:
    """aiohttp's own refusals (no such route, wrong method, body too large) in our form."""
    match error:
        case web.HTTPRequestEntityTooLarge():
            return ApiError(413, f"The request body is too large. {error.text or ''}".strip(), code="body_too_large")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return ApiError(
                405,
                f"{path} does not take {method}; it takes {allowed}.",
                code="method_not_allowed",
                headers={"Allow": allowed},
            )
        case web.HTTPNotFound():
            return ApiError(
                404, f"There is no {method} {path[:200]}. GET /openapi.json lists every route.", code="unknown_route"
            )
        case _:
            return ApiError(error.status, f"{error.status} {error.reason}", code="http_error")
