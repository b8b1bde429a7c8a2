"""The route table's entries. The application and ``/openapi.json`` are both made from the same table."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``schema`` is its JSON schema."""

    name: str
    place: Literal["path", "query", "header"]
    schema: dict[str, Any] = field(default_factory=lambda: {"type": "string"})
    description: str = ""


@dataclass(frozen=True)
class Answer:
    """One possible answer: a model as JSON, bytes of other media types, either of the two, or no body at all."""

    status: int
    description: str
    model: type[BaseModel] | None = None
    media_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """``errors`` are the statuses that come with an error object; ``body`` is what a request carries, as JSON and, with
    ``forms``, as a form.

    ``pattern`` is aiohttp's where it is not ``path`` itself. A route that is not ``described`` is not in the document.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: tuple[Answer, ...]
    parameters: tuple[Parameter, ...] = ()
    body: type[BaseModel] | None = None
    forms: bool = True
    errors: tuple[int, ...] = ()
    tag: str = "stack"
    pattern: str | None = None
    described: bool = True

    @property
    def name(self) -> str:
        return str(getattr(self.handler, "__name__", self.path))


def json_response(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=model.model_dump_json(), content_type=JSON, headers=headers)
