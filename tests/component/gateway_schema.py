"""Checks a value against the part of JSON Schema that the gateway's own document uses; anything else is refused."""

from typing import Any

_KNOWN = {
    "$ref",
    "anyOf",
    "additionalProperties",
    "const",
    "default",
    "description",
    "enum",
    "examples",
    "items",
    "maximum",
    "maxItems",
    "minimum",
    "minItems",
    "prefixItems",
    "properties",
    "propertyNames",
    "required",
    "title",
    "type",
}


class SchemaMismatch(AssertionError):
    """The value is not what the schema says."""


def check(value: Any, schema: dict[str, Any], document: dict[str, Any], where: str = "$") -> None:
    """Raise ``SchemaMismatch`` if ``value`` does not fit ``schema``, whose references point into ``document``."""
    unknown = set(schema) - _KNOWN
    if unknown:
        raise NotImplementedError(f"{where}: this check does not know {unknown}")
    if "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return check(value, target, document, where)
    if "anyOf" in schema:
        return _any(value, schema["anyOf"], document, where)
    if "const" in schema and value != schema["const"]:
        raise SchemaMismatch(f"{where}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise SchemaMismatch(f"{where}: {value!r} is none of {schema['enum']}")
    if "type" in schema and not _is(value, schema["type"]):
        raise SchemaMismatch(f"{where}: {value!r} is no {schema['type']}")
    if ("minimum" in schema and value < schema["minimum"]) or ("maximum" in schema and value > schema["maximum"]):
        raise SchemaMismatch(f"{where}: {value!r} is out of bounds")
    if isinstance(value, dict):
        _object(value, schema, document, where)
    if isinstance(value, list):
        parts = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        if len(parts) != len(value):
            raise SchemaMismatch(f"{where}: {len(value)} items instead of {len(parts)}")
        for index, (item, part) in enumerate(zip(value, parts, strict=True)):
            check(item, part, document, f"{where}[{index}]")
    return None


def _any(value: Any, options: list[dict[str, Any]], document: dict[str, Any], where: str) -> None:
    problems = []
    for option in options:
        try:
            return check(value, option, document, where)
        except SchemaMismatch as problem:
            problems.append(str(problem))
    raise SchemaMismatch("; or ".join(problems))


def _object(value: dict[str, Any], schema: dict[str, Any], document: dict[str, Any], where: str) -> None:
    missing = set(schema.get("required", ())) - set(value)
    if missing:
        raise SchemaMismatch(f"{where}: {missing} missing")
    properties = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            check(item, properties[name], document, f"{where}.{name}")
        elif more is False:
            raise SchemaMismatch(f"{where}: {name!r} is not described")
        elif isinstance(more, dict):
            check(item, more, document, f"{where}.{name}")
        if "propertyNames" in schema:
            check(name, schema["propertyNames"], document, f"{where}'s names")


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)
