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
        """The wire form: msgpack of ``[kind, version, body]``."""
        packed: bytes = msgpack.packb([type(self).__name__, self.version, self.model_dump(exclude_defaults=True)])
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
            return cls.model_validate(body)
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
    match envelope:
        case [str(kind), int(version), dict(body)]:
            return kind, version, body
    raise MessageError("not a packed message: expected [kind, version, body]")
