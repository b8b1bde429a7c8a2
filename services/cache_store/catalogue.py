"""What a cache store keeps, so that two of them find out in a few messages where they differ. Pure.

Keys are spread over buckets by their hash; a bucket's digest is the exclusive or of the hashes of its keys with their
versions, so that it follows each change at once and does not depend on the order in which keys came.
"""

import hashlib
from collections.abc import Mapping

BUCKETS = 256


class Catalogue:
    """Keys and their versions, by bucket."""

    def __init__(self) -> None:
        self._buckets: list[dict[str, int]] = [{} for _ in range(BUCKETS)]
        self._digests = [0] * BUCKETS

    def note(self, key: str, version: int | None) -> None:
        """``key`` has this version now; None: there is none any more."""
        number = _bucket_of(key)
        versions = self._buckets[number]
        before = versions.pop(key, None)
        if before is not None:
            self._digests[number] ^= _hash(key, before)
        if version is not None:
            versions[key] = version
            self._digests[number] ^= _hash(key, version)

    @property
    def digests(self) -> tuple[int, ...]:
        """Each bucket's digest, 64 bits."""
        return tuple(self._digests)

    def bucket(self, number: int) -> Mapping[str, int]:
        """The versions of the keys in one bucket."""
        return self._buckets[number]


def _bucket_of(key: str) -> int:
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0]


def _hash(key: str, version: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{version}/{key}".encode(), digest_size=8).digest(), "little")
