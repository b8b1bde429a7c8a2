"""Reads a request's body, whatever form it comes in, into one map of fields.

JSON, ``multipart/form-data`` and ``application/x-www-form-urlencoded`` are taken. In a form every value is text, so
numbers and flags are read out of it; in JSON a number in quotes is refused as the wrong type.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, ValidationError

from gateway.errors import ApiError, invalid

S = TypeVar("S", bound=BaseModel)

_MULTIPART = "multipart/form-data"
_FORMS = (_MULTIPART, "application/x-www-form-urlencoded")
_MOST_FIELDS = 100
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")
_FLAGS = {"true": True, "false": False}
_TYPES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


async def read_fields(
    request: web.Request, deadline_s: float, form_numbers: frozenset[str], form_flags: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The body's fields. In forms, those in ``form_numbers`` are read as numbers where they look like one, those in
    ``form_flags`` as true or false.

    Raises:
        ApiError: 400 not readable, 408 not sent in time, 413 too large, 415 another content type.
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await _read(request, form_numbers, form_flags)
    except TimeoutError as error:
        raise ApiError(408, f"The request body was not sent within {deadline_s:g} s.", code="body_timeout") from error


async def _read(request: web.Request, form_numbers: frozenset[str], form_flags: frozenset[str]) -> dict[str, Any]:
    content_type = request.content_type
    if content_type in _FORMS:
        readers = dict.fromkeys(form_numbers, _number) | dict.fromkeys(form_flags, _flag)
        return {
            name: readers[name](value) if name in readers else value for name, value in (await _form(request)).items()
        }
    # What sends no type at all (aiohttp then says octet-stream) most likely sends JSON.
    if content_type in ("application/json", "application/octet-stream") or content_type.endswith("+json"):
        return _json(await _bytes(request))
    raise ApiError(
        415,
        f"Content-Type {content_type!r} is not taken; send application/json or one of {', '.join(_FORMS)}.",
        code="unsupported_media_type",
    )


async def _bytes(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.RequestPayloadError as error:
        raise invalid(
            None, "The request body is damaged; check Content-Length and Content-Encoding.", "bad_body"
        ) from error


async def _form(request: web.Request) -> dict[str, Any]:
    try:
        form = await (_multipart(request) if request.content_type == _MULTIPART else _urlencoded(request))
    except (ValueError, LookupError, AssertionError, HttpProcessingError, web.RequestPayloadError) as error:
        raise invalid(
            None, "The form cannot be read; check its boundary and that text is UTF-8.", "bad_form"
        ) from error
    names = [name for name, _ in form]
    for name in names:
        if names.count(name) > 1:
            raise invalid(_printable(name), f"The form has {_printable(name)!r} more than once.", "duplicate_field")
    return dict(form)


async def _multipart(request: web.Request) -> list[tuple[str, Any]]:
    form = await request.post()
    return [(name, value if isinstance(value, str) else _Upload()) for name, value in form.items()]


async def _urlencoded(request: web.Request) -> list[tuple[str, Any]]:
    text = (await request.read()).decode()
    return list(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS))


class _Upload:
    """Stands for an uploaded file, of which no field takes one."""


def _number(value: object) -> object:
    if isinstance(value, str):
        text = value.strip()
        if _INTEGER.fullmatch(text):
            return int(text)
        if _NUMBER.fullmatch(text):
            return float(text)
    return value


def _flag(value: object) -> object:
    return _FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _json(data: bytes) -> dict[str, Any]:
    if not data.strip():
        raise invalid(None, "The request body is empty; send a JSON object.", "empty_body")
    try:
        body = json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise invalid(None, f"The request body is not valid JSON: {error.msg} at {where}.", "bad_json") from error
    except UnicodeDecodeError as error:
        raise invalid(None, f"The request body is not UTF-8 at byte {error.start}.", "bad_json") from error
    except (ValueError, RecursionError) as error:
        raise invalid(
            None, "The request body is not usable JSON: numbers too long or nesting too deep.", "bad_json"
        ) from error
    if not isinstance(body, dict):
        raise invalid(None, f"The request body must be a JSON object, not {_kind(body)}.", "bad_json")
    return body


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise invalid(name, f"The request body has {name[:80]!r} more than once.", "duplicate_field")
    return fields


def _no_constant(name: str) -> object:
    raise invalid(None, f"The request body is not valid JSON: {name} is not a JSON number.", "bad_json")


def parse_fields(schema: type[S], fields: Mapping[str, Any], unsupported: Mapping[str, str] | None = None) -> S:
    """``fields`` as ``schema``; null counts as left out. ``unsupported`` gives the reason for fields that others have.

    Raises:
        ApiError: 400, naming the field and what fits.
    """
    known = list(schema.model_fields)
    for name in fields:
        if unsupported and name in unsupported:
            raise invalid(name, f"{name!r} is not supported: {unsupported[name]}", "unsupported_field")
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise _unknown(unknown, known)
    for name, value in fields.items():
        _check_text(name, value)
    try:
        return schema.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise _of_validation(schema, error, fields) from error


def _unknown(unknown: list[str], known: list[str]) -> ApiError:
    near = get_close_matches(unknown[0].lower(), known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known are {', '.join(known)}."
    names = ", ".join(repr(_printable(name)) for name in unknown[:5])
    return invalid(
        _printable(unknown[0]), f"Unknown {'fields' if len(unknown) > 1 else 'field'} {names}.{hint}", "unknown_field"
    )


def _check_text(name: str, value: object) -> None:
    if isinstance(value, _Upload):
        raise invalid(name, f"{name!r} takes text, not a file.", "invalid_type")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise invalid(
                name, f"{name!r} holds half a character (a lone surrogate) at position {error.start}.", "not_unicode"
            ) from error


def _printable(text: str) -> str:
    return text[:80].encode("utf-8", "replace").decode()


def _of_validation(schema: type[BaseModel], error: ValidationError, fields: Mapping[str, Any]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return invalid(name, f"{name!r} is missing; it is required.", "missing_field")
    if first["type"].endswith("_type"):
        return invalid(name, f"{name!r} must be {_wanted(schema, name)}, not {_kind(fields[name])}.", "invalid_type")
    return invalid(name, f"{name!r}: {first['msg']}.")


def _wanted(schema: type[BaseModel], name: str) -> str:
    """The types that a field takes, in words, from its JSON schema."""
    described = schema.model_json_schema()["properties"][name]
    kinds = [option.get("type") for option in described.get("anyOf", [described])]
    return " or ".join(dict.fromkeys(_TYPES[kind] for kind in kinds if kind in _TYPES and kind != "null"))


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return f"the number {value}"[:40]
        case str():
            return f"the text {value[:40]!r}"
        case list():
            return "a list"
        case _:
            return "an object"
