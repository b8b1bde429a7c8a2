"""What is kept, whichever tier it lies in: the newest version under each key."""

from collections.abc import Callable

import structlog
import torch

from services.cache_store.disk import DiskTier
from services.cache_store.tier import Held, Tier, TierFull

log = structlog.get_logger()


class TensorStore:
    """Tensors by key: written through to disk, read from memory where they still are there.

    Each tier evicts for itself, so what memory had to let go is found on disk. All calls come from one event loop.

    Args:
        memory_bytes: the memory tier's size. Tensors that are being fetched or sent come on top.
        disk: the tier that outlives the process; None where there is none.
        clock: Unix seconds.
    """

    def __init__(self, memory_bytes: int, disk: DiskTier | None, clock: Callable[[], float]) -> None:
        self._memory = Tier(memory_bytes)
        self._tensors: dict[str, torch.Tensor] = {}
        self._disk = disk
        self._clock = clock

    def version(self, key: str) -> int | None:
        """The version kept under ``key``."""
        versions = [held.version for held in (self._memory.held(key), self._on_disk(key)) if held is not None]
        return max(versions, default=None)

    def check_room(self, key: str, size_bytes: int) -> None:
        """Raises TierFull where neither tier could take so much."""
        try:
            self._memory.check_room(key, size_bytes, self._clock())
        except TierFull:
            if self._disk is None:
                raise
            self._disk.check_room(key, size_bytes, self._clock())

    async def put(self, key: str, version: int, tensor: torch.Tensor, pin_s: float = 0.0) -> bool:
        """Keep ``tensor``, which nobody writes to any more. False: what is kept is as new, and stays.

        Returns once it is on disk, where there is one that takes it.

        Raises:
            TierFull: neither tier has room for it.
        """
        newest = self.version(key)
        if newest is not None and newest >= version:
            return False
        now_s = self._clock()
        self.check_room(key, tensor.nbytes)
        held = Held(version, tensor.nbytes, now_s + pin_s if pin_s > 0 else 0.0)
        in_memory = self._remember(key, held, tensor, now_s)
        if self._disk is None:
            return True
        try:
            await self._disk.write(key, held, tensor, now_s)
        except (TierFull, OSError) as error:
            log.warning("tensor not on disk", key=key, version=version, in_memory=in_memory, reason=str(error))
            if not in_memory:
                raise TierFull(f"{key!r} does not fit into memory, and the disk did not take it: {error}") from error
        return True

    async def get(self, key: str) -> tuple[int, torch.Tensor] | None:
        """The newest version and its tensor, which is shared: do not write to it."""
        held = self._memory.held(key)
        if held is not None:
            self._memory.used(key)
            if self._disk is not None:
                self._disk.used(key)
            return held.version, self._tensors[key]
        found = None if self._disk is None else await self._disk.read(key)
        held = self._on_disk(key)
        if found is not None and held is not None and held.version == found[0] and self._memory.held(key) is None:
            self._remember(key, held, found[1], self._clock())
        return found

    def drop(self, key: str) -> None:
        """Forget the key."""
        self._forget_in_memory(key)
        if self._disk is not None:
            self._disk.remove(key)

    async def close(self) -> None:
        """Let what is being written come to its end."""
        if self._disk is not None:
            await self._disk.close()

    def _on_disk(self, key: str) -> Held | None:
        return None if self._disk is None else self._disk.held(key)

    def _remember(self, key: str, held: Held, tensor: torch.Tensor, now_s: float) -> bool:
        """Keep it in memory if it fits there; an older version is not kept there in any case."""
        self._forget_in_memory(key)
        try:
            evicted = self._memory.admit(key, held, now_s)
        except TierFull:
            return False
        for each in evicted:
            del self._tensors[each]
        self._tensors[key] = tensor
        return True

    def _forget_in_memory(self, key: str) -> None:
        self._memory.remove(key)
        self._tensors.pop(key, None)
