"""The form of everything that crosses a process: a frozen model, packed with msgpack under its kind and version.

On the wire a message is the msgpack array ``[kind, version, body]``. ``kind`` is the class name, ``version`` an
integer that goes up whenever the meaning of a field changes, ``body`` a map of plain values.
"""

from typing import Any, ClassVar, Self

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError


class MessageError(ValueError):
    """Bytes that are not the message they were expected to be."""


class Message(BaseModel):
    """Base of every message. Immutable; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1

    def pack(self) -> bytes:
        """The wire form: msgpack of ``[kind, version, body]``.

        Raises:
            MessageError: a text is no Unicode (half a surrogate pair), or an integer needs more than 64 bits.
        """
        # The serializer and the validator themselves, not ``model_dump`` and ``model_validate``: they do the same, and
        # a request/reply round trip crosses them four times.
        body = self.__pydantic_serializer__.to_python(self, exclude_defaults=True)
        try:
            packed: bytes = msgpack.packb([type(self).__name__, self.version, body])
        except (UnicodeEncodeError, OverflowError) as error:
            raise MessageError(f"{type(self).__name__} cannot be packed: {error}") from error
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read the wire form back.

        Raises:
            MessageError: not msgpack, another kind, another version, or fields that do not fit.
        """
        kind, version, body = _envelope(data)
        if kind != cls.__name__:
            raise MessageError(f"expected a {cls.__name__}, got a {kind}")
        if version != cls.version:
            raise MessageError(f"{kind}: expected version {cls.version}, got {version}; upgrade the older process")
        try:
            message: Self = cls.__pydantic_validator__.validate_python(body)
            return message
        except ValidationError as error:
            raise MessageError(f"{kind}: {error}") from error


def kind_of(data: bytes) -> str:
    """The kind of a packed message, without reading its body."""
    return _envelope(data)[0]


def _envelope(data: bytes) -> tuple[str, int, Any]:
    try:
        envelope = msgpack.unpackb(data)
    except ValueError as error:
        raise MessageError(f"not a packed message: {error}") from error
    if isinstance(envelope, list) and len(envelope) == 3:
        kind, version, body = envelope
        if isinstance(kind, str) and isinstance(version, int) and isinstance(body, dict):
            return kind, version, body
    raise MessageError("not a packed message: expected [kind, version, body]")
