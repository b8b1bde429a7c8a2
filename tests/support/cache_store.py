"""A cache store over real NATS and UCX: its own ``serve`` in this process, and what an asker does with it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from common.bus.errors import DeadlineExceeded, NobodyThere
from common.bus.nats_bus import NatsBus
from common.messages.cache import AskDigests, DropTensor, FindTensor, ListBucket, StoreTensor, TensorFound, TensorStored
from common.messages.cluster import MemberState
from common.messages.subjects import (
    ASK_DIGESTS,
    DROP_TENSOR,
    FIND_COPY,
    FIND_TENSOR,
    LIST_BUCKET,
    MEMBERS,
    STORE_TENSOR,
)
from common.tensors.ucx import UcxTensors
from services.cache_store.catalogue import BUCKETS
from services.cache_store.config import CacheStoreSettings
from services.cache_store.service import serve

WAIT_S = 90.0


class CacheClient:
    """Stores, finds and drops, over a bus and tensors of its own."""

    def __init__(self, bus: NatsBus, tensors: UcxTensors) -> None:
        self.bus = bus
        self.tensors = tensors

    async def store(
        self,
        key: str,
        version: int,
        tensor: torch.Tensor,
        pin_s: float = 0.0,
        copies: int = 1,
        deadline_s: float = WAIT_S,
    ) -> TensorStored:
        ref = self.tensors.export(tensor, uses=1, lease_s=WAIT_S)
        request = StoreTensor(key=key, tensor_version=version, tensor=ref, pin_s=pin_s, copies=copies)
        try:
            return await self.bus.request(STORE_TENSOR, request, deadline_s=deadline_s)
        finally:
            await self.tensors.release(ref)

    async def find(self, key: str, uses: int = 1, deadline_s: float = WAIT_S) -> TensorFound:
        return await self.bus.request(FIND_TENSOR, FindTensor(key=key, uses=uses), deadline_s=deadline_s)

    async def load(self, key: str) -> tuple[int, torch.Tensor] | None:
        """The newest version and its tensor, fetched."""
        found = await self.find(key)
        if found.tensor_version is None or found.tensor is None:
            return None
        return found.tensor_version, await self.tensors.fetch(found.tensor, deadline_s=WAIT_S)

    async def version(self, key: str) -> int | None:
        return (await self.find(key, uses=0)).tensor_version

    async def drop(self, key: str, deadline_s: float = WAIT_S) -> None:
        await self.bus.request(DROP_TENSOR, DropTensor(key=key), deadline_s=deadline_s)

    async def versions_at(self, instance: str) -> dict[str, int]:
        """What one cache store has itself."""
        versions: dict[str, int] = {}
        for bucket in range(BUCKETS):
            versions |= (
                await self.bus.request(LIST_BUCKET, ListBucket(bucket=bucket), instance, deadline_s=WAIT_S)
            ).versions
        return versions

    async def load_from(self, instance: str, key: str) -> torch.Tensor:
        """What one cache store has itself under a key."""
        found = await self.bus.request(FIND_COPY, FindTensor(key=key), instance, deadline_s=WAIT_S)
        assert found.tensor is not None
        return await self.tensors.fetch(found.tensor, deadline_s=WAIT_S)

    async def agreed(self, *instances: str) -> dict[str, int]:
        """Return once the cache stores have the same; what that is."""
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(NobodyThere, DeadlineExceeded):
                    first, *others = [
                        await self.bus.request(ASK_DIGESTS, AskDigests(), instance, deadline_s=1.0)
                        for instance in instances
                    ]
                    if all(other == first for other in others):
                        return await self.versions_at(instances[0])
                await asyncio.sleep(0.02)

    async def answered(self, instance: str = "cache_store-0") -> None:
        """Return once there is this cache store, and it answers whatever it is asked.

        The record of a former life may say so too; but once any question is answered by this life, the record is its.
        """
        nothing = FindTensor(key="nothing", uses=0)
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(NobodyThere, DeadlineExceeded):
                    await self.bus.request(FIND_COPY, nothing, instance, deadline_s=1.0)
                    if (await self.bus.get(MEMBERS, instance)).value.state is MemberState.READY:
                        return
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def cache_client(url: str) -> AsyncIterator[CacheClient]:
    async with await NatsBus.connect(url, name="asker") as bus, await UcxTensors.open(owner="asker") as tensors:
        yield CacheClient(bus, tensors)


@contextlib.asynccontextmanager
async def running_store(
    client: CacheClient,
    url: str,
    folder: Path | None,
    *,
    memory_bytes: int = 1 << 20,
    disk_bytes: int = 1 << 20,
    instance: str = "cache_store-0",
) -> AsyncIterator[None]:
    """A cache store that answers while the block runs, and then is stopped as its process would be."""
    settings = CacheStoreSettings(
        nats_url=url,
        instance=instance,
        cache_dir=folder,
        cache_memory_bytes=memory_bytes,
        cache_disk_bytes=disk_bytes,
    )
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, stop))
    try:
        await client.answered(instance)
        yield
    finally:
        stop.set()
        await asyncio.wait_for(serving, WAIT_S)
