"""One tensor in one file: a header that checks itself, then the raw bytes with their SHA-256 in the header.

A file appears whole or not at all: it is written under another name and renamed. It is not synced: what a power cut
leaves half-written does not match its checksums and is dropped.

    magic | length of the header, its CRC-32 (little endian, 4 bytes each) | header (JSON) | the tensor's bytes
"""

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from common.tensors.errors import TensorMismatch
from common.tensors.memory import dtype_name, dtype_named
from services.cache_store.tier import Held

_MAGIC = b"triptych tensor 1\n"
_LENGTH_AND_CHECK = struct.Struct("<II")
_LONGEST_HEADER_BYTES = 1 << 20


class DamagedFile(ValueError):
    """The file is not what was written."""


@dataclass(frozen=True)
class FileHeader:
    """What a file says of its tensor. Times are Unix seconds, ``sha256`` is in hexadecimal."""

    key: str
    version: int
    pinned_until_s: float
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    sha256: str
    stored_at_s: float = 0.0
    checksum: int | None = None

    @property
    def held(self) -> Held:
        """Its place in a tier."""
        return Held(self.version, self.size_bytes, self.pinned_until_s, self.stored_at_s, self.checksum)


def write_tensor(path: Path, key: str, held: Held, tensor: torch.Tensor) -> None:
    """Put ``tensor``, on the CPU and contiguous, in place of what ``path`` holds.

    Raises:
        OSError: the disk did not take it; ``path`` is as it was.
    """
    data = _bytes_of(tensor)
    digest = hashlib.sha256(data).hexdigest()
    header = FileHeader(
        key,
        held.version,
        held.pinned_until_s,
        dtype_name(tensor.dtype),
        tuple(tensor.shape),
        tensor.nbytes,
        digest,
        held.stored_at_s,
        held.checksum,
    )
    packed = json.dumps(asdict(header)).encode()
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + _LENGTH_AND_CHECK.pack(len(packed), zlib.crc32(packed)) + packed)
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> FileHeader:
    """What the file says of itself, held against its length; the tensor's bytes are not looked at.

    Raises:
        DamagedFile: not such a file, damaged or cut off.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return _header(file, path)


def read_tensor(path: Path) -> tuple[FileHeader, torch.Tensor]:
    """The tensor, every byte checked.

    Raises:
        DamagedFile: not what was written, or of a dtype this process's torch does not know.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = _header(file, path)
        try:
            tensor = torch.empty(header.shape, dtype=dtype_named(header.dtype))
        except TensorMismatch as error:
            raise DamagedFile(f"{path.name}: {error}") from error
        if tensor.nbytes != header.size_bytes:
            raise DamagedFile(f"{path.name}: {header.shape} of {header.dtype} is not {header.size_bytes} bytes")
        data = _bytes_of(tensor)
        file.readinto(data)
    if hashlib.sha256(data).hexdigest() != header.sha256:
        raise DamagedFile(f"{path.name}: the bytes do not match their checksum")
    return header, tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _header(file: BinaryIO, path: Path) -> FileHeader:
    start = file.read(len(_MAGIC) + _LENGTH_AND_CHECK.size)
    if not start.startswith(_MAGIC) or len(start) != len(_MAGIC) + _LENGTH_AND_CHECK.size:
        raise DamagedFile(f"{path.name}: no tensor file, or one of another version")
    length, check = _LENGTH_AND_CHECK.unpack(start[len(_MAGIC) :])
    packed = file.read(min(length, _LONGEST_HEADER_BYTES))
    if len(packed) != length or zlib.crc32(packed) != check:
        raise DamagedFile(f"{path.name}: the header does not match its checksum")
    fields = json.loads(packed)
    header = FileHeader(**(fields | {"shape": tuple(fields["shape"])}))
    expected_bytes = len(start) + length + header.size_bytes
    if path.stat().st_size != expected_bytes:
        raise DamagedFile(f"{path.name}: {path.stat().st_size} bytes, not {expected_bytes}")
    return header
