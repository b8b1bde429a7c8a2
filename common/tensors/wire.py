"""What two processes say to each other over UCX tags, beside the bytes of a tensor themselves.

A tag has 64 bits: the kind of message (8), the fetch it belongs to (40), the piece of the tensor (16). The fetch
number is the fetcher's, fresh for every fetch, so that a piece of an older one can be told and dropped.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

MAXIMUM_PIECES = 1 << 16
MAXIMUM_CONTROL_BYTES = 1 << 16
_FETCH_BITS = 40
_PIECE_BITS = 16
_FETCH_MASK = (1 << _FETCH_BITS) - 1
_PIECE_MASK = (1 << _PIECE_BITS) - 1
_HEAD = struct.Struct("<BQQQdI")
_ID = struct.Struct("<Q")
_VERSION = 1


class Kind(IntEnum):
    FETCH = 1  # fetcher to owner: send me this tensor
    PIECE = 2  # owner to fetcher: bytes of it
    UNKNOWN = 3  # owner to fetcher: there is no such tensor
    TAKEN = 4  # fetcher to owner: all bytes are here, count one use
    RELEASE = 5  # anybody to owner: forget it


def tag_of(kind: Kind, fetch_id: int = 0, piece: int = 0) -> int:
    return kind << (_FETCH_BITS + _PIECE_BITS) | (fetch_id & _FETCH_MASK) << _PIECE_BITS | piece


def read_tag(tag: int) -> tuple[int, int, int]:
    """Kind (any number: the sender may be anybody), fetch number, piece."""
    return tag >> (_FETCH_BITS + _PIECE_BITS), tag >> _PIECE_BITS & _FETCH_MASK, tag & _PIECE_MASK


class FetchRequest(NamedTuple):
    """Ask for ``size_bytes`` of ``tensor_id`` in pieces of ``piece_bytes``, the last one shorter.

    ``address`` is the fetcher's worker address. ``connection`` counts how often the fetcher has begun anew with this
    owner: a higher number than before tells it that its own endpoint leads to nowhere. ``remaining_s`` is what is left
    of the fetcher's deadline: after it, nobody reads the tensor.
    """

    tensor_id: int
    size_bytes: int
    piece_bytes: int
    remaining_s: float
    connection: int
    address: bytes

    def pack(self) -> bytes:
        head = _HEAD.pack(
            _VERSION, self.tensor_id, self.size_bytes, self.piece_bytes, self.remaining_s, self.connection
        )
        return head + self.address

    @classmethod
    def unpack(cls, data: bytes) -> "FetchRequest":
        """Raises ValueError where ``data`` is not a request of this version."""
        if len(data) <= _HEAD.size or data[0] != _VERSION:
            raise ValueError(f"not a fetch request of version {_VERSION}")
        _, tensor_id, size_bytes, piece_bytes, remaining_s, connection = _HEAD.unpack_from(data)
        if piece_bytes < 1 or piece_count(size_bytes, piece_bytes) > MAXIMUM_PIECES:
            raise ValueError(f"{size_bytes} bytes in pieces of {piece_bytes}")
        return cls(tensor_id, size_bytes, piece_bytes, remaining_s, connection, data[_HEAD.size :])


def pack_id(tensor_id: int) -> bytes:
    return _ID.pack(tensor_id)


def unpack_id(data: bytes) -> int:
    """Raises ValueError where ``data`` is no identifier."""
    if len(data) != _ID.size:
        raise ValueError(f"a tensor's identifier has {_ID.size} bytes, not {len(data)}")
    number: int = _ID.unpack(data)[0]
    return number


def piece_count(size_bytes: int, piece_bytes: int) -> int:
    """At least one, so that a tensor of no bytes is asked for and answered like any other."""
    return max(1, -(-size_bytes // piece_bytes))


def piece_range(size_bytes: int, piece_bytes: int, piece: int) -> tuple[int, int]:
    """First byte of a piece, and the first after it."""
    start = piece * piece_bytes
    return start, min(size_bytes, start + piece_bytes)
