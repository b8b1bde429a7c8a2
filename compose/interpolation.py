"""Variables in a compose file.

Understood are ``$NAME``, ``${NAME}``, ``${NAME:-default}``, ``${NAME-default}``, ``${NAME:?why}`` and ``$$``.
"""

import re
from collections.abc import Mapping
from typing import Any

from compose.errors import ComposeError

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?:(?P<operator>:?[-?])(?P<rest>[^{}]*))?\})"
)


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """``value`` with the variables in every string of it, however deep, replaced.

    Raises:
        ComposeError: a stray ``$``, or a variable that must be set and is not.
    """
    match value:
        case str():
            return _text(value, variables)
        case dict():
            return {key: interpolate(inner, variables) for key, inner in value.items()}
        case list():
            return [interpolate(inner, variables) for inner in value]
    return value


def _text(text: str, variables: Mapping[str, str]) -> str:
    remainder = _VARIABLE.sub("", text)
    if "$" in remainder:
        raise ComposeError(f"{text!r}: a '$' that starts no variable; write '$$' for a dollar sign")
    return _VARIABLE.sub(lambda found: _replacement(found, variables), text)


def _replacement(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    name, operator = found["plain"] or found["name"], found["operator"] or ""
    value = variables.get(name)
    # With a colon, an empty value counts as none.
    absent = not value if operator.startswith(":") else value is None
    if operator.endswith("-"):
        return found["rest"] if absent else value or ""
    if operator.endswith("?") and absent:
        raise ComposeError(f"variable {name} must be set: {found['rest'] or 'no default'}")
    return value or ""
