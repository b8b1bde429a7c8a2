"""Writes ``/openapi.json`` (OpenAPI 3.1) from the route table and the pydantic models. Pure."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.routing import JSON, Answer, Parameter, Route
from gateway.schemas import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
_BODY_TYPES = (JSON, "multipart/form-data", "application/x-www-form-urlencoded")
_ERRORS = {
    400: "The request cannot be carried out as it is; the error names the field and the remedy.",
    404: "There is no such thing here.",
    408: "The body was not sent in time.",
    409: "Not in this state.",
    413: "The body is too large.",
    415: "The body's content type is not taken.",
    416: "The range lies outside the file.",
    429: "The queue is full; see Retry-After.",
    500: "Unexpected; the server's log has the details.",
    503: "Not at the moment; see Retry-After.",
    507: "The server's storage is full.",
}


def describe(routes: Iterable[Route], title: str, version: str) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    table = [route for route in routes if route.described]
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": _schemas(table)},
    }


def _schemas(routes: list[Route]) -> dict[str, Any]:
    models: dict[str, tuple[type[BaseModel], str]] = {}
    for route in routes:
        for answer in route.answers:
            if answer.model is not None:
                models[answer.model.__name__] = (answer.model, "serialization")
        if route.body is not None:
            models[route.body.__name__] = (route.body, "validation")
    models["ErrorBody"] = (ErrorBody, "serialization")
    _, definitions = models_json_schema(list(models.values()), ref_template=_REFERENCE)  # type: ignore[arg-type]
    schemas: dict[str, Any] = definitions["$defs"]
    return dict(sorted(schemas.items()))


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {str(answer.status): _answer(answer) for answer in route.answers},
    }
    for status in (*route.errors, 500):
        operation["responses"].setdefault(str(status), _answer(Answer(status, _ERRORS[status], ErrorBody)))
    if route.parameters:
        operation["parameters"] = [_parameter(parameter) for parameter in route.parameters]
    if route.body is not None:
        reference = {"schema": {"$ref": _REFERENCE.format(model=route.body.__name__)}}
        kinds = _BODY_TYPES if route.forms else (JSON,)
        operation["requestBody"] = {"required": True, "content": {kind: reference for kind in kinds}}
    return operation


def _answer(answer: Answer) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.description}
    content: dict[str, Any] = {kind: {} for kind in answer.media_types}
    if answer.model is not None:
        content[JSON] = {"schema": {"$ref": _REFERENCE.format(model=answer.model.__name__)}}
    if content:
        described["content"] = content
    return described


def _parameter(parameter: Parameter) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "schema": parameter.schema,
    }
    if parameter.description:
        described["description"] = parameter.description
    return described
