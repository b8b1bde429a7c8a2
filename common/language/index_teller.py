"""Tells the scheduler what this instance has cached: every change as it comes, and all of it when asked."""

import asyncio
import time
from collections import deque

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.language.stepper import Stepper
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from common.mempool.events import Change, PoolEvent
from common.mempool.pool import MemPool
from common.messages.kv_index import AskIndex, IndexChanged, IndexTold
from common.messages.subjects import INDEX_CHANGED
from common.policies.language.prompt_index import IndexChange, IndexPublisher, IndexSnapshot

log = structlog.get_logger()

# What has not been sent yet. Beyond it the oldest are left out, which shows as a gap and is repaired.
_MOST_WAITING = 4096
_PART_BYTES = 256 << 10


class IndexTeller:
    """The pool's listener. Changes come while the engine is touched, in whatever thread; they leave from the loop."""

    def __init__(self, bus: Bus, instance: str, memory: MemPool, stepper: Stepper) -> None:
        self._bus = bus
        self._stepper = stepper
        self._publisher = IndexPublisher(instance, time.time_ns(), KEY_BYTES)
        self._waiting: deque[IndexChange] = deque(maxlen=_MOST_WAITING)
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._snapshot: IndexSnapshot | None = None
        memory.listener = self._hear

    async def run(self) -> None:
        """Send what changes, in order, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting:
                await self._send(self._waiting.popleft())

    async def tell(self, asked: AskIndex) -> IndexTold:
        """All that is here, or a later part of what was here then."""
        if asked.part == 0 or self._snapshot is None:
            # Not while a step changes it.
            self._snapshot = await self._stepper.between(self._publisher.snapshot)
        snapshot = self._snapshot
        parts = _parts(snapshot.sequences)
        part = min(asked.part, len(parts) - 1)
        return IndexTold(
            instance=snapshot.instance,
            incarnation=snapshot.incarnation,
            number=snapshot.number,
            part=part,
            parts=len(parts),
            sequences=parts[part],
            blocks=snapshot.after.blocks,
            digest=snapshot.after.digest,
        )

    def _hear(self, event: PoolEvent) -> None:
        if event.change is Change.INSERTED:
            change = self._publisher.inserted(event.tokens)
        else:
            change = self._publisher.evicted(event.tokens, event.kept_tokens // BLOCK_TOKENS)
        self._waiting.append(change)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def _send(self, change: IndexChange) -> None:
        message = IndexChanged(
            instance=change.instance,
            incarnation=change.incarnation,
            number=change.number,
            tokens=change.tokens,
            kept_blocks=change.kept_blocks,
            blocks=change.after.blocks,
            digest=change.after.digest,
        )
        try:
            await self._bus.publish(INDEX_CHANGED, message)
        except BusError as error:
            log.warning("change of the index not sent", number=change.number, reason=str(error))


def _parts(sequences: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """In parts that fit a message; one at least."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for sequence in sequences:
        if parts[-1] and size + len(sequence) > _PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(sequence)
        size += len(sequence)
    return [tuple(part) for part in parts]
