"""Keeping one other cache store as this one is: the store that was written to, or told to forget, does the copying.

What has changed here is told to the other one soon after. What either has missed (one of them was away, or too much
waited) is found by comparing digests, and only that is copied. Each store does so for what it has itself, so two of
them come to the same.
"""

import asyncio
from collections import OrderedDict

import structlog

from common.bus.errors import BusError, RemoteFailure
from common.bus.port import Bus
from common.messages.cache import AskDigests, CopyTensor, DropCopy, ListBucket
from common.messages.subjects import ASK_DIGESTS, COPY_TENSOR, DROP_COPY, LIST_BUCKET
from common.tensors.errors import TensorError
from common.tensors.port import Tensors
from services.cache_store.store import TensorStore

log = structlog.get_logger()

# More changes than this do not wait: the stores are compared instead.
MOST_WAITING = 4096
COPY_DEADLINE_S = 1.0
COPY_BYTES_PER_S = 50e6
COMPARE_DEADLINE_S = 2.0
# After something went wrong, until the next try.
PAUSE_S = 0.5


class Replica:
    """The other store ``instance``. ``run`` does the work; ``changed`` never waits."""

    def __init__(self, bus: Bus, tensors: Tensors, store: TensorStore, instance: str) -> None:
        self._bus = bus
        self._tensors = tensors
        self._store = store
        self.instance = instance
        # By key, what will be known of the change: whether it was told, or given up.
        self._changes: OrderedDict[str, asyncio.Future[bool]] = OrderedDict()
        self._under_way: asyncio.Future[bool] | None = None
        self._wake = asyncio.Event()
        self._differs = True
        self.failing = False
        self.copied = 0

    def changed(self, key: str) -> asyncio.Future[bool]:
        """Have the other told what is here under ``key`` now. The future: whether it is as this one is there then."""
        loop = asyncio.get_running_loop()
        future = self._changes.pop(key) if key in self._changes else loop.create_future()
        if self.failing:
            # It is compared as soon as it can be reached.
            future.set_result(False)
            return future
        self._changes[key] = future
        if len(self._changes) > MOST_WAITING:
            self._differs = True
            _, oldest = self._changes.popitem(last=False)
            oldest.set_result(False)
        self._wake.set()
        return future

    async def run(self) -> None:
        """Keep the other up to date; runs until cancelled."""
        while True:
            try:
                await self._tell_changes()
                if self._differs:
                    await self._compare()
                await self._wake.wait()
            except (BusError, TensorError) as error:
                self._failed(error)
                await asyncio.sleep(PAUSE_S)

    def give_up(self) -> None:
        """Nobody waits any more for what was to be told."""
        for future in (self._under_way, *self._changes.values()):
            if future is not None and not future.done():
                future.set_result(False)
        self._under_way = None
        self._changes.clear()

    async def _tell_changes(self) -> None:
        self._wake.clear()
        while self._changes:
            key, self._under_way = self._changes.popitem(last=False)
            self._under_way.set_result(await self._tell(key))
            self._under_way = None

    async def _tell(self, key: str, *, missed: bool = False) -> bool:
        """What is here under the key, or that it was dropped. ``missed``: long ago, so that nothing goes for it.

        Returns whether the other has what this one has.
        """
        if self._store.held(key) is not None:
            return await self._copy(key, missed)
        dropped_at_s = self._store.dropped.at_s(key)
        if dropped_at_s is not None:
            drop = DropCopy(key=key, dropped_at_s=dropped_at_s)
            await self._bus.request(DROP_COPY, drop, self.instance, deadline_s=COPY_DEADLINE_S)
        return True

    async def _copy(self, key: str, missed: bool) -> bool:
        found = await self._store.peek(key)
        if found is None:
            return False
        held, tensor = found
        deadline_s = COPY_DEADLINE_S + tensor.nbytes / COPY_BYTES_PER_S
        ref = self._tensors.export(tensor, uses=1, lease_s=2 * deadline_s)
        copy = CopyTensor(
            key=key,
            tensor_version=held.version,
            tensor=ref,
            stored_at_s=held.stored_at_s,
            pinned_until_s=held.pinned_until_s,
            spare=missed and not self._store.pinned(held),
            checksum=held.checksum,
        )
        try:
            answer = await self._bus.request(COPY_TENSOR, copy, self.instance, deadline_s=deadline_s)
            self.copied += answer.stored
            return answer.tensor_version >= held.version
        except RemoteFailure as refusal:
            if refusal.failure.code != "store_full":
                raise
            log.info("no room for a copy", key=key, at=self.instance)
            return False
        finally:
            # Where it was not fetched; else it is gone already.
            await self._tensors.release(ref)

    async def _compare(self) -> None:
        """Bring the other up to date with what it has missed. What changes meanwhile goes first."""
        self._differs = False
        theirs = (
            await self._bus.request(ASK_DIGESTS, AskDigests(), self.instance, deadline_s=COMPARE_DEADLINE_S)
        ).digests
        ours = self._store.catalogue.digests
        # Of what changes from here on, no digest tells.
        self._recovered()
        differing = [number for number, digest in enumerate(ours) if digest != theirs[number]]
        before = self.copied
        for number in differing:
            await self._level(number)
        log.info("compared", other=self.instance, differing_buckets=len(differing), copied=self.copied - before)

    async def _level(self, number: int) -> None:
        asked = ListBucket(bucket=number)
        theirs = (await self._bus.request(LIST_BUCKET, asked, self.instance, deadline_s=COMPARE_DEADLINE_S)).versions
        ours = self._store.catalogue.bucket(number)
        newer = [key for key, version in ours.items() if theirs.get(key, -1) < version]
        gone = [key for key in theirs if key not in ours]
        for key in newer + gone:
            await self._tell_changes()
            await self._tell(key, missed=True)

    def _recovered(self) -> None:
        if self.failing:
            log.info("the other cache store takes copies again", other=self.instance)
        self.failing = False

    def _failed(self, error: Exception) -> None:
        if not self.failing:
            log.warning("the other cache store takes no copies", other=self.instance, reason=str(error))
        self.failing = self._differs = True
        self.give_up()
