"""A cache store over real NATS and UCX: its own ``serve`` in this process, and what an asker does with it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from common.bus.errors import DeadlineExceeded, NobodyThere
from common.bus.nats_bus import NatsBus
from common.messages.cache import DropTensor, FindTensor, StoreTensor, TensorFound, TensorStored
from common.messages.subjects import DROP_TENSOR, FIND_TENSOR, STORE_TENSOR
from common.tensors.ucx import UcxTensors
from services.cache_store.config import CacheStoreSettings
from services.cache_store.service import serve

WAIT_S = 20.0


class CacheClient:
    """Stores, finds and drops, over a bus and tensors of its own."""

    def __init__(self, bus: NatsBus, tensors: UcxTensors) -> None:
        self.bus = bus
        self.tensors = tensors

    async def store(self, key: str, version: int, tensor: torch.Tensor, pin_s: float = 0.0) -> TensorStored:
        ref = self.tensors.export(tensor, uses=1, lease_s=WAIT_S)
        request = StoreTensor(key=key, tensor_version=version, tensor=ref, pin_s=pin_s)
        try:
            return await self.bus.request(STORE_TENSOR, request, deadline_s=WAIT_S)
        finally:
            await self.tensors.release(ref)

    async def find(self, key: str, uses: int = 1) -> TensorFound:
        return await self.bus.request(FIND_TENSOR, FindTensor(key=key, uses=uses), deadline_s=WAIT_S)

    async def load(self, key: str) -> tuple[int, torch.Tensor] | None:
        """The newest version and its tensor, fetched."""
        found = await self.find(key)
        if found.tensor_version is None or found.tensor is None:
            return None
        return found.tensor_version, await self.tensors.fetch(found.tensor, deadline_s=WAIT_S)

    async def version(self, key: str) -> int | None:
        return (await self.find(key, uses=0)).tensor_version

    async def drop(self, key: str) -> None:
        await self.bus.request(DROP_TENSOR, DropTensor(key=key), deadline_s=WAIT_S)

    async def answered(self) -> None:
        """Return once there is a cache store."""
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(NobodyThere, DeadlineExceeded):
                    await self.bus.request(FIND_TENSOR, FindTensor(key="nothing", uses=0), deadline_s=1.0)
                    return
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def cache_client(url: str) -> AsyncIterator[CacheClient]:
    async with await NatsBus.connect(url, name="asker") as bus, await UcxTensors.open(owner="asker") as tensors:
        yield CacheClient(bus, tensors)


@contextlib.asynccontextmanager
async def running_store(
    client: CacheClient, url: str, folder: Path | None, *, memory_bytes: int = 1 << 20, disk_bytes: int = 1 << 20
) -> AsyncIterator[None]:
    """A cache store that answers while the block runs, and then is stopped as its process would be."""
    settings = CacheStoreSettings(
        nats_url=url,
        instance="cache_store-0",
        cache_dir=folder,
        cache_memory_bytes=memory_bytes,
        cache_disk_bytes=disk_bytes,
    )
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, stop))
    try:
        await client.answered()
        yield
    finally:
        stop.set()
        await asyncio.wait_for(serving, WAIT_S)
