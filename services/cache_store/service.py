"""The cache store: a process without compute that keeps tensors for others, in memory and on disk.

What it keeps is a matter of its askers: step checkpoints of videos today. Everything about them is in their key and
version; see ``common.messages.cache`` for what can be asked.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog

from common.bus.errors import Refusal
from common.bus.nats_bus import NatsBus
from common.bus.port import Bus, Subscription
from common.messages.cache import DropTensor, FindTensor, StoreTensor, TensorFound, TensorStored
from common.messages.cluster import Service
from common.messages.failures import Acknowledged, Failure, Stage
from common.messages.subjects import DROP_TENSOR, FIND_TENSOR, MEMBERS, STORE_TENSOR
from common.runtime.membership import Registration
from common.runtime.process import CannotServe
from common.tensors.errors import TensorError
from common.tensors.port import Tensors
from common.tensors.ucx import UcxTensors
from services.cache_store.config import CacheStoreSettings
from services.cache_store.disk import DiskTier
from services.cache_store.store import TensorStore
from services.cache_store.tier import TierFull

log = structlog.get_logger()

FETCH_DEADLINE_S = 4.0
# Each may be fetching a tensor, so this bounds what comes on top of the memory tier.
MAX_STORES_IN_FLIGHT = 4
QUEUE_GROUP = "cache_store"


class CacheStore:
    """Answers what is asked over the bus; the tensors come and go over UCX."""

    def __init__(self, bus: Bus, tensors: Tensors, store: TensorStore, found_lease_s: float) -> None:
        self._bus = bus
        self._tensors = tensors
        self._store = store
        self._found_lease_s = found_lease_s

    async def listen(self) -> Sequence[Subscription]:
        return (
            await self._bus.serve(
                STORE_TENSOR, self._keep, queue_group=QUEUE_GROUP, max_in_flight=MAX_STORES_IN_FLIGHT
            ),
            await self._bus.serve(FIND_TENSOR, self._find, queue_group=QUEUE_GROUP),
            await self._bus.serve(DROP_TENSOR, self._drop, queue_group=QUEUE_GROUP),
        )

    async def _keep(self, request: StoreTensor) -> TensorStored:
        kept = self._store.version(request.key)
        if kept is not None and kept >= request.tensor_version:
            return TensorStored(key=request.key, tensor_version=kept, stored=False)
        try:
            self._store.check_room(request.key, request.tensor.size_bytes)
            tensor = await self._tensors.fetch(request.tensor, deadline_s=FETCH_DEADLINE_S)
            stored = await self._store.put(request.key, request.tensor_version, tensor, request.pin_s)
        except TierFull as error:
            raise _refusal("store_full", error) from error
        except TensorError as error:
            raise _refusal("tensor_not_fetched", error) from error
        version = request.tensor_version if stored else self._store.version(request.key)
        return TensorStored(key=request.key, tensor_version=version or 0, stored=stored)

    async def _find(self, request: FindTensor) -> TensorFound:
        if not request.uses:
            return TensorFound(key=request.key, tensor_version=self._store.version(request.key))
        found = await self._store.get(request.key)
        if found is None:
            return TensorFound(key=request.key)
        version, tensor = found
        ref = self._tensors.export(tensor, uses=request.uses, lease_s=self._found_lease_s)
        return TensorFound(key=request.key, tensor_version=version, tensor=ref)

    async def _drop(self, request: DropTensor) -> Acknowledged:
        self._store.drop(request.key)
        return Acknowledged()


def _refusal(code: str, error: Exception) -> Refusal:
    return Refusal(Failure(stage=Stage.CACHE_STORE, code=code, message=str(error), retryable=True))


async def open_store(settings: CacheStoreSettings, instance: str) -> TensorStore:
    """The store with what its former life left on disk.

    Raises:
        CannotServe: the folder cannot be used.
    """
    disk = None
    if settings.cache_dir is not None:
        folder = settings.cache_dir / instance
        started_s = time.monotonic()
        try:
            disk = await DiskTier.open(folder, settings.cache_disk_bytes, time.time())
        except OSError as error:
            raise CannotServe(f"TRIPTYCH_CACHE_DIR: cannot keep tensors in {folder}: {error}") from error
        seconds = time.monotonic() - started_s
        log.info("disk tier indexed", tensors=len(disk), bytes=disk.used_bytes, seconds=seconds)
    return TensorStore(settings.cache_memory_bytes, disk, time.time)


async def serve(settings: CacheStoreSettings, stop: asyncio.Event) -> None:
    """Join the cluster and keep tensors until ``stop``; then finish what is under way."""
    instance = settings.instance_of(Service.CACHE_STORE)
    bus = await NatsBus.connect(settings.nats_url, name=instance, stage=Stage.CACHE_STORE)
    tensors = await UcxTensors.open(owner=instance)
    try:
        await bus.prepare(buckets=(MEMBERS,))
        async with Registration(bus, settings, Service.CACHE_STORE) as registration:
            store = await open_store(settings, instance)
            subscriptions = await CacheStore(bus, tensors, store, settings.found_lease_s).listen()
            await registration.ready()
            await stop.wait()
            await registration.draining()
            for subscription in subscriptions:
                await subscription.stop(settings.drain_s)
            await store.close()
    finally:
        await tensors.close()
        await bus.close()
