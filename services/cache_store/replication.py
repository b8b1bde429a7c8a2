"""The other cache stores, as they come and go: each is kept as this one is, and asked for what this one may lack.

How many there are is nobody's setting: a store that joins gets everything, whatever it has from a former life.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import structlog

from common.bus.errors import BusError, NobodyThere
from common.bus.port import Bus
from common.messages.cache import FindTensor, FindTensors, HaveTensors, TensorFound, TensorsPart
from common.messages.cluster import Service
from common.messages.subjects import FIND_COPIES, FIND_COPY, HAVE_COPIES, Reply, Request, RequestSubject
from common.runtime.membership import MemberChange, MemberDraining, MemberJoined, MemberLost, MembershipView
from common.tensors.port import Tensors
from services.cache_store.replica import Replica
from services.cache_store.store import TensorStore

log = structlog.get_logger()

# Whoever asks this store waits meanwhile; a store that does not answer is not asked again before it takes copies.
ASK_DEADLINE_S = 0.25
# The same for many tensors, some from disk.
FIND_DEADLINE_S = 0.75
# Whoever stores waits for copies no longer than this.
COPIES_DEADLINE_S = 0.4


class Replication:
    """Knows the other stores. Make it ``running`` before this store answers anybody."""

    def __init__(self, bus: Bus, tensors: Tensors, store: TensorStore, instance: str, member_timeout_s: float) -> None:
        self._bus = bus
        self._tensors = tensors
        self._store = store
        self._instance = instance
        self._view = MembershipView(bus, member_timeout_s, self._member_changed)
        self._replicas: dict[str, tuple[Replica, asyncio.Task[None]]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the others up to date while the block runs."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                async with self._view.running():
                    yield
            finally:
                for instance in list(self._replicas):
                    self._forget(instance)

    def changed(self, key: str) -> None:
        """Have the others told, in the background, what is here under ``key`` now."""
        for replica, _ in self._replicas.values():
            replica.changed(key)

    async def copied(self, key: str, copies: int) -> int:
        """The same; returns how many stores have it, this one among them: ``copies``, or as many as can be had soon."""
        told = {replica.changed(key) for replica, _ in self._replicas.values()}
        deadline_s = asyncio.get_running_loop().time() + COPIES_DEADLINE_S
        have = 1
        while told and have < copies:
            left_s = deadline_s - asyncio.get_running_loop().time()
            done, told = await asyncio.wait(told, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            have += sum(future.result() for future in done)
        return have

    async def newer(self, request: FindTensor) -> TensorFound | None:
        """What another store has above ``request.above``, the newest of all; None where nobody has."""
        best: TensorFound | None = None
        for found in await self._ask_all(FIND_COPY, request, ASK_DEADLINE_S):
            if found.tensor_version is not None and found.tensor_version > _version(best, request.above):
                best = found
        return best

    async def have(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that another store has."""
        if not keys:
            return set()
        answers = await self._ask_all(HAVE_COPIES, HaveTensors(keys=tuple(keys)), ASK_DEADLINE_S)
        return {key for answer in answers for key, had in zip(keys, answer.had, strict=True) if had}

    async def find(self, request: FindTensors) -> list[TensorsPart]:
        """Of keys that this store lacks, what others have; places are those in the request's ``keys``."""
        if not request.keys:
            return []
        answers = await self._ask_all(FIND_COPIES, request, FIND_DEADLINE_S)
        return [part for answer in answers for part in answer.parts]

    async def _ask_all(
        self, subject: RequestSubject[Request, Reply], request: Request, deadline_s: float
    ) -> list[Reply]:
        others = [replica for replica, _ in self._replicas.values() if not replica.failing]
        answers = await asyncio.gather(*(self._ask(subject, request, replica, deadline_s) for replica in others))
        return [answer for answer in answers if answer is not None]

    async def _ask(
        self, subject: RequestSubject[Request, Reply], request: Request, replica: Replica, deadline_s: float
    ) -> Reply | None:
        try:
            return await self._bus.request(subject, request, replica.instance, deadline_s=deadline_s)
        except NobodyThere:
            self._view.doubt(replica.instance)
        except BusError as error:
            log.info("the other cache store did not answer", other=replica.instance, reason=str(error))
        return None

    def _member_changed(self, change: MemberChange) -> None:
        member = change.member
        if member.service is not Service.CACHE_STORE or member.instance == self._instance:
            return
        match change:
            case MemberJoined():
                replica = Replica(self._bus, self._tensors, self._store, member.instance)
                task = self._tasks.create_task(replica.run(), name=f"replica-{member.instance}")
                self._replicas[member.instance] = replica, task
            case MemberDraining() | MemberLost():
                self._forget(member.instance)

    def _forget(self, instance: str) -> None:
        known = self._replicas.pop(instance, None)
        if known is not None:
            replica, task = known
            task.cancel()
            replica.give_up()


def _version(found: TensorFound | None, otherwise: int | None) -> int:
    version = found.tensor_version if found is not None else otherwise
    return -1 if version is None else version
