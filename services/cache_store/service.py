"""The cache store: a process without compute that keeps tensors for others, in memory and on disk (MemServe 4).

What it keeps is a matter of its askers: step checkpoints of videos, embeddings of prompts, KV blocks. Everything about
them is in their key and version; see ``common.messages.cache`` for what can be asked. Several cache stores are copies
of each other, and any of them may be asked.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog

from common.bus.nats_bus import NatsBus
from common.bus.port import Subscription
from common.messages.cache import (
    AskDigests,
    BucketListed,
    CopyTensor,
    Digests,
    DropCopy,
    DropTensor,
    FindTensor,
    ListBucket,
    StoreTensor,
    TensorFound,
    TensorStored,
)
from common.messages.cluster import Service
from common.messages.failures import Acknowledged, Stage
from common.messages.subjects import (
    ASK_DIGESTS,
    COPY_TENSOR,
    DROP_COPY,
    DROP_TENSOR,
    FIND_COPY,
    FIND_TENSOR,
    LIST_BUCKET,
    MEMBERS,
    STORE_TENSOR,
)
from common.runtime.membership import Registration
from common.runtime.process import CannotServe
from common.tensors.ucx import UcxTensors
from services.cache_store.batches import Batches
from services.cache_store.config import CacheStoreSettings
from services.cache_store.desk import StoreDesk, refusing
from services.cache_store.disk import DiskTier
from services.cache_store.replication import Replication
from services.cache_store.store import TensorStore
from services.cache_store.tier import Held

log = structlog.get_logger()

FETCH_DEADLINE_S = 4.0
# Each may be fetching a tensor, so this bounds what comes on top of the memory tier.
MAX_STORES_IN_FLIGHT = 4
EVERYWHERE = 1 << 30


class CacheStore(StoreDesk):
    """Answers what is asked over the bus; the tensors come and go over UCX."""

    async def listen(self) -> Sequence[Subscription]:
        """Answer anybody."""
        return (
            await self._serve(STORE_TENSOR, self._keep, MAX_STORES_IN_FLIGHT),
            await self._serve(FIND_TENSOR, self._find),
            await self._serve(DROP_TENSOR, self._drop),
        )

    async def listen_to_others(self) -> Sequence[Subscription]:
        """Answer the other cache stores: before anybody else is answered here."""
        return (
            await self._serve_others(COPY_TENSOR, self._copy, MAX_STORES_IN_FLIGHT),
            await self._serve_others(DROP_COPY, self._drop_copy),
            await self._serve_others(FIND_COPY, self._find_here),
            await self._serve_others(ASK_DIGESTS, self._digests),
            await self._serve_others(LIST_BUCKET, self._list),
        )

    # --- for anybody ----------------------------------------------------------------------------------------------

    async def _keep(self, request: StoreTensor) -> TensorStored:
        kept = self._store.version(request.key)
        stored = False
        if kept is None or kept < request.tensor_version:
            with refusing():
                self._store.check_room(request.key, request.tensor.size_bytes)
                tensor = await self._tensors.fetch(request.tensor, deadline_s=FETCH_DEADLINE_S)
                stored = await self._store.put(request.key, request.tensor_version, tensor, request.pin_s)
        copies = await self._others.copied(request.key, request.copies) if stored or request.copies > 1 else 1
        version = request.tensor_version if stored else self._store.version(request.key)
        return TensorStored(key=request.key, tensor_version=version or 0, stored=stored, copies=copies)

    async def _find(self, request: FindTensor) -> TensorFound:
        """The newest version that any store has; copies may still be on their way here."""
        floors = [floor for floor in (self._store.version(request.key), request.above) if floor is not None]
        newer = await self._others.newer(request.model_copy(update={"above": max(floors, default=None)}))
        return newer if newer is not None else await self._find_here(request)

    async def _drop(self, request: DropTensor) -> Acknowledged:
        await self._store.drop(request.key)
        await self._others.copied(request.key, EVERYWHERE)
        return Acknowledged()

    # --- for the other cache stores -------------------------------------------------------------------------------

    async def _find_here(self, request: FindTensor) -> TensorFound:
        version = self._store.version(request.key)
        if version is None or not request.uses or (request.above is not None and version <= request.above):
            return TensorFound(key=request.key, tensor_version=version)
        found = await self._store.get(request.key)
        if found is None:
            return TensorFound(key=request.key)
        version, tensor = found
        ref = self._tensors.export(tensor, uses=request.uses, lease_s=self._found_lease_s)
        return TensorFound(key=request.key, tensor_version=version, tensor=ref)

    async def _copy(self, request: CopyTensor) -> TensorStored:
        size_bytes = request.tensor.size_bytes
        held = Held(request.tensor_version, size_bytes, request.pinned_until_s, request.stored_at_s, request.checksum)
        stored = False
        with refusing():
            if self._store.wants(request.key, held, request.spare):
                tensor = await self._tensors.fetch(request.tensor, deadline_s=FETCH_DEADLINE_S)
                # Looked at again: it may have been dropped while it was on its way.
                if self._store.wants(request.key, held, request.spare):
                    stored = await self._store.keep(request.key, held, tensor)
        version = self._store.version(request.key)
        return TensorStored(key=request.key, tensor_version=-1 if version is None else version, stored=stored)

    async def _drop_copy(self, request: DropCopy) -> Acknowledged:
        await self._store.drop_until(request.key, request.dropped_at_s)
        return Acknowledged()

    async def _digests(self, _: AskDigests) -> Digests:
        return Digests(digests=self._store.catalogue.digests)

    async def _list(self, request: ListBucket) -> BucketListed:
        return BucketListed(versions=dict(self._store.catalogue.bucket(request.bucket)))


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
            others = Replication(bus, tensors, store, instance, settings.member_timeout_s)
            answering = CacheStore(bus, tensors, store, others, instance, settings.found_lease_s)
            batches = Batches(bus, tensors, store, others, instance, settings.found_lease_s)
            subscriptions = [*await answering.listen_to_others(), *await batches.listen_to_others()]
            async with others.running():
                subscriptions += [*await answering.listen(), *await batches.listen()]
                await registration.ready()
                await stop.wait()
                await registration.draining()
                for subscription in subscriptions:
                    await subscription.stop(settings.drain_s)
            await store.close()
    finally:
        await tensors.close()
        await bus.close()
