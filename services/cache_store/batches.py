"""Many tensors in one request: what has one version for ever, such as KV blocks under the hash of their prefix.

What this store lacks it looks for at the others; what it has is not asked about there, since it cannot be older.
"""

import asyncio
from collections.abc import Sequence

import structlog
import torch

from common.bus.port import Subscription
from common.messages.cache import (
    DropTensors,
    FindTensors,
    HaveTensors,
    StoreTensors,
    TensorsFound,
    TensorsHad,
    TensorsPart,
    TensorsStored,
)
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    DROP_TENSORS,
    FIND_COPIES,
    FIND_TENSORS,
    HAVE_COPIES,
    HAVE_TENSORS,
    STORE_TENSORS,
)
from services.cache_store.desk import StoreDesk, refusal, refusing
from services.cache_store.tier import TierFull

log = structlog.get_logger()

# At the rate of a slow disk and a busy link.
FETCH_DEADLINE_S = 10.0
MAX_BATCHES_IN_FLIGHT = 2
# So much longer than its asker waits is kept what was found, for requests and fetches that are on their way.
GRACE_S = 1.0
ONLY_VERSION = 0


class Batches(StoreDesk):
    """Answers what is asked for many keys at once."""

    async def listen(self) -> Sequence[Subscription]:
        """Answer anybody."""
        return (
            await self._serve(STORE_TENSORS, self._keep, MAX_BATCHES_IN_FLIGHT),
            await self._serve(FIND_TENSORS, self._find, MAX_BATCHES_IN_FLIGHT),
            await self._serve(HAVE_TENSORS, self._have),
            await self._serve(DROP_TENSORS, self._drop),
        )

    async def listen_to_others(self) -> Sequence[Subscription]:
        """Answer the other cache stores."""
        return (
            await self._serve_others(HAVE_COPIES, self._have_here),
            await self._serve_others(FIND_COPIES, self._find_here, MAX_BATCHES_IN_FLIGHT),
        )

    async def _keep(self, request: StoreTensors) -> TensorsStored:
        shape, count = request.tensor.shape, len(request.keys)
        if not shape or shape[0] != count or len(request.checksums) not in (0, count):
            checksums = len(request.checksums)
            raise refusal(
                "bad_batch", f"{count} keys, {checksums} checksums for a tensor of shape {shape}", retryable=False
            )
        new = [place for place, key in enumerate(request.keys) if self._store.held(key) is None]
        if not new:
            return TensorsStored(stored=0)
        with refusing():
            tensors = await self._tensors.fetch(request.tensor, deadline_s=FETCH_DEADLINE_S)
        stored = 0
        # The last first: without what comes before it a block is of no use, so it is to be evicted before that.
        for place in reversed(new):
            key = request.keys[place]
            checksum = request.checksums[place] if request.checksums else None
            try:
                # A copy: a view would keep the whole batch in memory for as long as one of it is kept.
                stored += await self._store.put(key, ONLY_VERSION, tensors[place].clone(), checksum=checksum)
            except TierFull as full:
                log.info("batch cut off", kept=stored, of=len(new), reason=str(full))
                break
            self._others.changed(key)
        return TensorsStored(stored=stored)

    async def _have(self, request: HaveTensors) -> TensorsHad:
        here = (await self._have_here(request)).had
        lacking = [key for key, had in zip(request.keys, here, strict=True) if not had]
        elsewhere = await self._others.have(lacking)
        return TensorsHad(had=tuple(had or key in elsewhere for key, had in zip(request.keys, here, strict=True)))

    async def _have_here(self, request: HaveTensors) -> TensorsHad:
        self._used(request.keys)
        return TensorsHad(had=tuple(self._store.held(key) is not None for key in request.keys))

    async def _find(self, request: FindTensors) -> TensorsFound:
        here = (await self._find_here(request)).parts
        found = {place for part in here for place in part.places}
        lacking = [place for place in range(len(request.keys)) if place not in found]
        asked = request.model_copy(update={"keys": tuple(request.keys[place] for place in lacking)})
        elsewhere = [
            part.model_copy(update={"places": tuple(lacking[place] for place in part.places)})
            for part in await self._others.find(asked)
        ]
        return TensorsFound(parts=(*here, *elsewhere))

    async def _find_here(self, request: FindTensors) -> TensorsFound:
        places: list[int] = []
        tensors: list[torch.Tensor] = []
        checksums: list[int | None] = []
        left_bytes = request.most_bytes
        for place, key in enumerate(request.keys):
            held = self._store.held(key)
            found = await self._store.get(key) if held is not None and held.size_bytes <= left_bytes else None
            if held is None or found is None:
                if request.leading:
                    break
                continue
            left_bytes -= held.size_bytes
            if tensors and (found[1].shape, found[1].dtype) != (tensors[0].shape, tensors[0].dtype):
                raise refusal("bad_batch", f"{key} is of another shape or dtype than the others", retryable=False)
            places.append(place)
            tensors.append(found[1])
            checksums.append(held.checksum)
        if not places:
            return TensorsFound()
        self._used(request.keys)
        together = await asyncio.to_thread(torch.stack, tensors)
        # An asker that has given up does not say so.
        wait_s = self._found_lease_s if request.wait_s is None else request.wait_s + GRACE_S
        ref = self._tensors.export(together, uses=1, lease_s=min(wait_s, self._found_lease_s))
        return TensorsFound(parts=(TensorsPart(places=tuple(places), tensor=ref, checksums=tuple(checksums)),))

    def _used(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):
            self._store.used(key)

    async def _drop(self, request: DropTensors) -> Acknowledged:
        for key in request.keys:
            await self._store.drop(key)
            self._others.changed(key)
        return Acknowledged()
