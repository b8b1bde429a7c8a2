"""The cache store's settings."""

from pathlib import Path

from pydantic import Field

from common.runtime.settings import ServiceSettings

_GIB = 1 << 30


class CacheStoreSettings(ServiceSettings):
    """How much is kept where.

    ``cache_dir``: the disk tier's folder; each instance has its own folder in it. Without one, nothing outlives the
    process. ``found_lease_s``: how long a tensor that was asked for waits to be fetched. ``drain_s``: how long requests
    under way may go on after the process was asked to stop.
    """

    cache_dir: Path | None = None
    cache_memory_bytes: int = Field(default=_GIB, ge=0)
    cache_disk_bytes: int = Field(default=8 * _GIB, ge=0)
    found_lease_s: float = Field(default=60.0, gt=0)
    drain_s: float = Field(default=5.0, ge=0)
