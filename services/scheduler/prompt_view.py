"""Follows what language instances have cached, and repairs what it missed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.messages.kv_index import AskIndex, AskView, IndexChanged, IndexTold, InstanceViewed, ViewTold
from common.messages.subjects import INDEX_CHANGED, TELL_INDEX, TELL_VIEW
from common.policies.language.prompt_index import AskSnapshot, IndexChange, IndexSnapshot, PromptIndex
from common.policies.language.prompt_tree import Holding

log = structlog.get_logger()

_DEADLINE_S = 2.0
_AGAIN_S = 1.0
# What was routed counts as cached until its instance says so, or half as long at least.
_EXPECTED_S = 20.0


class PromptView:
    """The prompt index, fed from the bus. Repairs run while ``running`` does."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._index = PromptIndex(KEY_BYTES, ttl_s=_EXPECTED_S)
        self._followed: set[str] = set()
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen while the block runs."""
        subscriptions = (
            await self._bus.subscribe(INDEX_CHANGED, self._changed),
            await self._bus.serve(TELL_VIEW, self._tell),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._repair([AskSnapshot(instance, "it was there before") for instance in self._followed])
                try:
                    yield
                finally:
                    self._tasks = None
                    for repair in self._repairs.values():
                        repair.cancel()
        finally:
            for subscription in subscriptions:
                await subscription.stop(deadline_s=1.0)

    def cached(self, tokens: bytes) -> dict[str, int]:
        """How many tokens of the beginning each instance has, as far as is known."""
        found = self._index.match(tokens, asyncio.get_running_loop().time())
        return {instance: blocks * BLOCK_TOKENS for instance, blocks in found.items()}

    def best(self, tokens: bytes) -> int:
        """How many tokens of the beginning the instance has that has the most of them, as they have told."""
        return max(self._index.told(tokens).values(), default=0) * BLOCK_TOKENS

    def expect(self, instance: str, tokens: bytes) -> None:
        """The instance was told to compute these. Whoever keeps nothing will not keep them either."""
        if self._index.holding(instance).blocks:
            self._index.expect(instance, tokens)

    def follow(self, instance: str) -> None:
        """It has joined: what does it have?"""
        self.forget(instance)
        self._followed.add(instance)
        self._repair([AskSnapshot(instance, "it has joined")])

    def forget(self, instance: str) -> None:
        """It is gone with all it had."""
        self._followed.discard(instance)
        self._index.forget(instance)
        repair = self._repairs.pop(instance, None)
        if repair is not None:
            repair.cancel()

    async def _tell(self, _: AskView) -> ViewTold:
        return ViewTold(
            instances=tuple(
                InstanceViewed(
                    instance=view.instance,
                    incarnation=view.incarnation,
                    number=view.number,
                    awaited=view.awaited,
                    blocks=view.holding.blocks,
                    digest=view.holding.digest,
                )
                for view in self._index.views()
            )
        )

    def _changed(self, told: IndexChanged) -> None:
        if told.instance not in self._followed:
            return
        after = Holding(told.blocks, told.digest)
        change = IndexChange(told.instance, told.incarnation, told.number, told.tokens, told.kept_blocks, after)
        self._repair(self._index.handle(change))

    def _repair(self, asked: list[AskSnapshot]) -> None:
        for one in asked:
            log.info("view of an instance's index to be repaired", instance=one.instance, reason=one.reason)
            if self._tasks is not None and one.instance not in self._repairs:
                name = f"index of {one.instance}"
                self._repairs[one.instance] = self._tasks.create_task(self._restore(one.instance), name=name)

    async def _restore(self, instance: str) -> None:
        """Ask until all is there and fits; the next change finds out if it does not."""
        again = True
        while again:
            try:
                snapshot = await self._ask(instance)
                again = bool(self._index.handle(snapshot))
            except BusError as error:
                log.warning("index not told", instance=instance, reason=str(error))
            if again:
                await asyncio.sleep(_AGAIN_S)
        del self._repairs[instance]

    async def _ask(self, instance: str) -> IndexSnapshot:
        first = await self._part(instance, 0)
        sequences = list(first.sequences)
        for part in range(1, first.parts):
            told = await self._part(instance, part)
            if (told.incarnation, told.number, told.part) != (first.incarnation, first.number, part):
                # Somebody else has asked, or it has begun anew: what fits is taken when it is asked again.
                break
            sequences += told.sequences
        after = Holding(first.blocks, first.digest)
        return IndexSnapshot(instance, first.incarnation, first.number, tuple(sequences), after)

    async def _part(self, instance: str, part: int) -> IndexTold:
        return await self._bus.request(TELL_INDEX, AskIndex(part=part), instance, deadline_s=_DEADLINE_S)
