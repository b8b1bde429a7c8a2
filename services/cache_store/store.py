"""What is kept, whichever tier it lies in: the newest version under each key."""

from collections.abc import Callable

import structlog
import torch

from services.cache_store.catalogue import Catalogue
from services.cache_store.disk import DiskTier
from services.cache_store.dropped import Dropped
from services.cache_store.tier import Held, Tier, TierFull

log = structlog.get_logger()


class TensorStore:
    """Tensors by key: written through to disk, read from memory where they still are there.

    Each tier evicts for itself, so what memory had to let go is found on disk. All calls come from one event loop.
    ``catalogue`` has what is kept now, ``dropped`` what was dropped lately.

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
        self.catalogue = Catalogue()
        self.dropped = Dropped() if disk is None else disk.dropped
        self._memory.listen(self._changed)
        if disk is not None:
            disk.listen(self._changed)
            for key in disk:
                self._changed(key)

    def held(self, key: str) -> Held | None:
        """What is known of the newest version under ``key``."""
        places = [held for held in (self._memory.held(key), self._on_disk(key)) if held is not None]
        return max(places, key=lambda held: held.version, default=None)

    def version(self, key: str) -> int | None:
        """The version kept under ``key``."""
        held = self.held(key)
        return None if held is None else held.version

    def pinned(self, held: Held) -> bool:
        """Whether it is not to be evicted now."""
        return held.pinned_until_s > self._clock()

    def check_room(self, key: str, size_bytes: int) -> None:
        """Raises TierFull where neither tier could take so much."""
        try:
            self._memory.check_room(key, size_bytes, self._clock())
        except TierFull:
            if self._disk is None:
                raise
            self._disk.check_room(key, size_bytes, self._clock())

    def wants(self, key: str, held: Held, spare: bool) -> bool:
        """Whether a copy that lies in another store is to be kept here too; a spare one only where it evicts nothing.

        What was dropped after it was stored is not wanted.
        """
        newest = self.version(key)
        dropped_at_s = self.dropped.at_s(key)
        if (newest is not None and newest >= held.version) or (
            dropped_at_s is not None and held.stored_at_s <= dropped_at_s
        ):
            return False
        lasting = self._memory if self._disk is None else self._disk
        return not (spare and lasting.evicts(key, held.size_bytes, self._clock()))

    async def put(
        self, key: str, version: int, tensor: torch.Tensor, pin_s: float = 0.0, checksum: int | None = None
    ) -> bool:
        """Keep ``tensor``, which nobody writes to any more. False: what is kept is as new, and stays.

        Returns once it is on disk, where there is one that takes it.

        Raises:
            TierFull: neither tier has room for it.
        """
        now_s = self._clock()
        pinned_until_s = now_s + pin_s if pin_s > 0 else 0.0
        return await self.keep(key, Held(version, tensor.nbytes, pinned_until_s, now_s, checksum), tensor)

    async def keep(self, key: str, held: Held, tensor: torch.Tensor) -> bool:
        """The same, for what may have been stored elsewhere before."""
        newest = self.version(key)
        if newest is not None and newest >= held.version:
            return False
        now_s = self._clock()
        self.check_room(key, tensor.nbytes)
        in_memory = self._remember(key, held, tensor, now_s)
        if self._disk is None:
            return True
        try:
            await self._disk.write(key, held, tensor, now_s)
        except (TierFull, OSError) as error:
            log.warning("tensor not on disk", key=key, version=held.version, in_memory=in_memory, reason=str(error))
            if not in_memory:
                raise TierFull(f"{key!r} does not fit into memory, and the disk did not take it: {error}") from error
        return True

    def used(self, key: str) -> None:
        """Note that ``key`` was asked for: what was asked for longest ago is evicted first."""
        if self._disk is not None:
            self._disk.used(key)
        self._memory.used(key)

    async def get(self, key: str) -> tuple[int, torch.Tensor] | None:
        """The newest version and its tensor, which is shared: do not write to it."""
        self.used(key)
        found = await self.peek(key)
        if found is None:
            return None
        held, tensor = found
        on_disk = self._on_disk(key)
        if self._memory.held(key) is None and on_disk is not None and on_disk.version == held.version:
            self._remember(key, on_disk, tensor, self._clock())
        return held.version, tensor

    async def peek(self, key: str) -> tuple[Held, torch.Tensor] | None:
        """The same, without taking it for use: what is evicted first stays as it is."""
        held = self._memory.held(key)
        if held is not None:
            return held, self._tensors[key]
        return None if self._disk is None else await self._disk.read(key)

    async def drop(self, key: str) -> None:
        """Forget the key at once; returns when that outlives this process."""
        await self.drop_until(key, self._clock())

    async def drop_until(self, key: str, at_s: float) -> None:
        """The same for what was stored under the key until ``at_s`` (Unix seconds), when it was dropped."""
        held = self.held(key)
        if held is not None and held.stored_at_s > at_s:
            return
        self.dropped.note(key, at_s)
        self._forget_in_memory(key)
        if self._disk is not None:
            await self._disk.drop(key, at_s)

    async def close(self) -> None:
        """Let what is being written come to its end."""
        if self._disk is not None:
            await self._disk.close()

    def _on_disk(self, key: str) -> Held | None:
        return None if self._disk is None else self._disk.held(key)

    def _changed(self, key: str) -> None:
        self.catalogue.note(key, self.version(key))

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
