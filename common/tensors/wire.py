"""What two processes say to each other over UCX tags, beside the bytes of a tensor themselves.

A tag has 64 bits: the kind of message (8), the fetch it belongs to (40), the piece of the tensor (16). The fetch
number is the fetcher's, fresh for every fetch, so that a piece of an older one can be told and dropped. The pieces of
all tensors of a fetch are counted through, in the order in which they were asked for.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

MAXIMUM_PIECES = 1 << 16
# Of one fetch. To post so many sends takes an owner's event loop about a millisecond.
MAXIMUM_TENSORS = 128
MAXIMUM_CONTROL_BYTES = 1 << 16
_FETCH_BITS = 40
_PIECE_BITS = 16
_FETCH_MASK = (1 << _FETCH_BITS) - 1
_PIECE_MASK = (1 << _PIECE_BITS) - 1
_HEAD = struct.Struct("<BHHQdI")
_ID_BYTES = 8
_VERSION = 3


class Kind(IntEnum):
    FETCH = 1  # fetcher to owner: send me these tensors
    PIECE = 2  # owner to fetcher: bytes of one
    UNKNOWN = 3  # owner to fetcher: none is sent, for there is not the one whose number stands for the piece
    TAKEN = 4  # fetcher to owner: all bytes of these are here, count one use of each
    RELEASE = 5  # anybody to owner: forget it


def tag_of(kind: Kind, fetch_id: int = 0, piece: int = 0) -> int:
    return kind << (_FETCH_BITS + _PIECE_BITS) | (fetch_id & _FETCH_MASK) << _PIECE_BITS | piece


def read_tag(tag: int) -> tuple[int, int, int]:
    """Kind (any number: the sender may be anybody), fetch number, piece."""
    return tag >> (_FETCH_BITS + _PIECE_BITS), tag >> _PIECE_BITS & _FETCH_MASK, tag & _PIECE_MASK


class FetchRequest(NamedTuple):
    """Ask for tensors of ``sizes_bytes`` in pieces of ``piece_bytes``, each one's last shorter.

    ``address`` is the fetcher's worker address. ``connection`` counts how often the fetcher has begun anew with this
    owner: a higher number than before tells it that its own endpoint leads to nowhere. ``remaining_s`` is what is left
    of the fetcher's deadline: after it, nobody reads the tensors. ``taken`` says what TAKEN would: a fetcher that asks
    for the next tensor at once needs no message of its own for the one before.
    """

    tensor_ids: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    piece_bytes: int
    remaining_s: float
    connection: int
    address: bytes
    taken: tuple[int, ...] = ()

    def pack(self) -> bytes:
        head = _HEAD.pack(
            _VERSION, len(self.address), len(self.tensor_ids), self.piece_bytes, self.remaining_s, self.connection
        )
        return head + self.address + pack_ids(self.tensor_ids + self.sizes_bytes + self.taken)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "FetchRequest":
        """Raises ValueError where ``data`` is not a request of this version."""
        if len(data) <= _HEAD.size or data[0] != _VERSION:
            raise ValueError(f"not a fetch request of version {_VERSION}")
        _, length, count, piece_bytes, remaining_s, connection = _HEAD.unpack_from(data)
        end = _HEAD.size + length
        address, numbers = bytes(data[_HEAD.size : end]), unpack_ids(data[end:])
        if not 1 <= count <= MAXIMUM_TENSORS or len(numbers) < 2 * count:
            raise ValueError(f"{count} tensors in {len(data)} bytes")
        tensor_ids, sizes, taken = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
        if piece_bytes < 1 or sum(sizes) // piece_bytes + count > MAXIMUM_PIECES:
            raise ValueError(f"{sizes} bytes in pieces of {piece_bytes}")
        return cls(tensor_ids, sizes, piece_bytes, remaining_s, connection, address, taken)


def pack_ids(tensor_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tensor_ids)}Q", *tensor_ids) if tensor_ids else b""


def unpack_ids(data: bytes | bytearray) -> tuple[int, ...]:
    """Raises ValueError where ``data`` is not a run of identifiers."""
    if len(data) % _ID_BYTES:
        raise ValueError(f"identifiers have {_ID_BYTES} bytes each, together not {len(data)}")
    return struct.unpack(f"<{len(data) // _ID_BYTES}Q", data) if data else ()


def pieces_of(sizes_bytes: Sequence[int], piece_bytes: int) -> list[tuple[int, int, int]]:
    """The pieces of a fetch in order: number of the tensor, first byte in it, and the first after.

    Of each tensor there is at least one, so that one of no bytes is asked for and answered like any other.
    """
    if max(sizes_bytes) <= piece_bytes:
        return [(tensor, 0, size) for tensor, size in enumerate(sizes_bytes)]
    return [
        (tensor, start, min(size, start + piece_bytes))
        for tensor, size in enumerate(sizes_bytes)
        for start in range(0, max(1, size), piece_bytes)
    ]


def piece_size(sizes_bytes: Sequence[int], stripe_bytes: int) -> int:
    """``stripe_bytes``, or more where there would be too many pieces."""
    return max(stripe_bytes, -(-sum(sizes_bytes) // (MAXIMUM_PIECES - len(sizes_bytes))))
