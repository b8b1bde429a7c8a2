"""What is done for one sequence beside the engine, and what becomes of the sequence where that fails unexpectedly.

A request that no instance can stand would otherwise end one after another, as its gateway tries it elsewhere.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from common.language.held import Held

log = structlog.get_logger()

# What fails may be one sequence's fault. So many of a kind in a row are the process's, which then ends.
_FAILED_TASKS = 3

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
SpawnFor = Callable[[Held, Callable[[], Awaitable[None]], str], asyncio.Task[None]]


class SequenceTasks:
    """Of one instance, any number at once. ``lose`` is told of each sequence that is to be given up here, and why."""

    def __init__(self, spawn: Spawn, lose: Callable[[Held, Exception], Awaitable[None]]) -> None:
        self._spawn = spawn
        self._lose = lose
        self._failed: Counter[str] = Counter()

    def spawn(self, held: Held, work: Callable[[], Awaitable[None]], kind: str) -> asyncio.Task[None]:
        """Do ``work`` for a sequence; ``kind`` says what that is. It raises what is taken for the process's fault."""
        return self._spawn(self._run(held, work, kind), f"{kind} {held.key}")

    async def _run(self, held: Held, work: Callable[[], Awaitable[None]], kind: str) -> None:
        try:
            await work()
        except Exception as error:
            self._failed[kind] += 1
            log.exception("sequence given up", sequence=held.key, kind=kind, in_a_row=self._failed[kind])
            if self._failed[kind] >= _FAILED_TASKS:
                raise
            await self._lose(held, error)
        else:
            del self._failed[kind]
