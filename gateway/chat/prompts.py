"""Reads the prompts of a request: a conversation's messages, or a completion's many forms. Pure."""

from collections.abc import Sequence
from typing import Any

from gateway.chat.schemas import MAX_SEQUENCES
from gateway.errors import ApiError, invalid

_ROLES = ("system", "developer", "user", "assistant")
_FIELDS = {"role", "content", "name", "refusal"}
_SHOWN = 40


def read_messages(messages: Sequence[Any]) -> list[dict[str, str]]:
    """The conversation with every content as plain text.

    Raises:
        ApiError: 400, naming the message and the field.
    """
    if not messages:
        raise invalid("messages", "'messages' is empty; send at least one message with a role and a content.")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise invalid(where, f"{where!r} must be an object with 'role' and 'content'.", "invalid_type")
    role = message.get("role")
    if role in ("tool", "function"):
        raise invalid(f"{where}.role", f"Role {role!r} is not supported: there are no tools here.", "unsupported_field")
    if role not in _ROLES:
        raise invalid(f"{where}.role", f"'{where}.role' must be one of {', '.join(_ROLES)}, not {_shown(role)}.")
    for name, value in message.items():
        if name not in _FIELDS and value not in (None, []):
            raise invalid(
                f"{where}.{name[:_SHOWN]}",
                f"'{where}.{name[:_SHOWN]}' is not supported; a message has 'role', 'content' and 'name'.",
                "unsupported_field",
            )
    # Templates know "system"; "developer" is OpenAI's newer word for it.
    read = {"role": "system" if role == "developer" else role, "content": _content(where, message.get("content"))}
    if message.get("name") is not None:
        read["name"] = _text(f"{where}.name", message["name"])
    return read


def _content(where: str, content: Any) -> str:
    where = f"{where}.content"
    if not isinstance(content, list):
        return _text(where, content)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise invalid(
                f"{where}[{place}]",
                f"'{where}[{place}]' must be a part of type 'text', not {_shown(kind)}: this model reads text alone.",
                "unsupported_content",
            )
        texts.append(_text(f"{where}[{place}].text", part.get("text")))
    return "".join(texts)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(where, f"{where!r} must be a text, not {_shown(value)}.", "invalid_type")
    return whole_characters(where, value)


def whole_characters(where: str, text: str) -> str:
    """The text itself. Raises ApiError if it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            where, f"{where!r} holds half a character (a lone surrogate) at position {error.start}.", "not_unicode"
        ) from error
    return text


def read_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """A completion's prompts, each a text or token ids; it has one text, several, one's ids or several lists of ids.

    Raises:
        ApiError: 400.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _wrong_prompt("an empty list")
    if all(isinstance(part, str) for part in prompt):
        return [whole_characters(f"prompt[{place}]", part) for place, part in enumerate(prompt)]
    if _is_ids(prompt):
        return [prompt]
    if all(isinstance(part, list) and part and _is_ids(part) for part in prompt):
        return list(prompt)
    raise _wrong_prompt("a list of other things")


def _is_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _wrong_prompt(what: str) -> ApiError:
    return invalid(
        "prompt",
        f"'prompt' must be a text, a list of texts, a list of token ids or a list of such lists, not {what}; at most "
        f"{MAX_SEQUENCES} of them.",
        "invalid_type",
    )


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN].encode("utf-8", "replace").decode()
