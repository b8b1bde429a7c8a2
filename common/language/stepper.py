"""Runs an engine: its steps in the compute thread, and whatever else touches it between two of them.

So the event loop stays free during a step, and nothing changes under the engine's hands.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from common.bus.errors import Refusal
from common.engine import Engine, Output
from common.messages.failures import Failure, Stage
from common.runtime.worker import ComputeThread

log = structlog.get_logger()

R = TypeVar("R")

DRAINING = "draining"
"""The code of what is refused, and of sequences that are given up, because the process leaves."""

# A step that fails may be one sequence's fault. So many in a row are the process's, which then ends.
_FAILED_STEPS = 3


class Stepper:
    """``absorb`` is given what each step brought, ``lose`` the sequences that were given up because one failed.

    Both run between two steps.
    """

    def __init__(
        self,
        engine: Engine,
        compute: ComputeThread,
        absorb: Callable[[list[Output]], Awaitable[None]],
        lose: Callable[[list[str], Exception], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._compute = compute
        self._absorb = absorb
        self._lose = lose
        self._work: list[Callable[[], object]] = []
        self._asked = asyncio.Event()
        self._attempts: list[Callable[[], bool]] = []
        self._awaited: set[asyncio.Future[Any]] = set()
        self._failed = 0
        self.ended = False
        """Whether there will be no further step."""
        self.computed: Callable[[int, float], None] | None = None
        """Told how many tokens of prompts a step computed, and in how many seconds."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return self._engine.busy

    def soon(self, work: Callable[[], object]) -> None:
        """Have ``work`` done before the next step, in the order of asking. It must not fail."""
        self._work.append(work)
        self._asked.set()

    async def between(self, work: Callable[[], R]) -> R:
        """Do ``work`` before the next step, and wait for what it returns or raises.

        Raises:
            Refusal: there is no further step.
        """
        result: asyncio.Future[R] = self._result()

        def settle() -> None:
            # Done even if nobody waits any more: it may be what gives something back.
            try:
                value = work()
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                if not result.done():
                    result.set_exception(error)
            else:
                if not result.done():
                    result.set_result(value)

        self.soon(settle)
        return await asyncio.shield(result)

    async def until(self, attempt: Callable[[], R | None], deadline_s: float) -> R | None:
        """Try before every step until something comes of it; who asked first is first.

        None: nothing had by ``deadline_s`` (the loop's time). There is no other way to end it: what came of an attempt
        must not get lost.

        Raises:
            Refusal: there is no further step.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[R | None] = self._result()

        def settle() -> bool:
            if (value := attempt()) is not None or loop.time() >= deadline_s:
                result.set_result(value)
            return result.done()

        self._attempts.append(settle)
        self._asked.set()
        timer = loop.call_at(deadline_s, self._asked.set)
        try:
            return await asyncio.shield(result)
        finally:
            timer.cancel()

    def _result(self) -> asyncio.Future[Any]:
        """Of something that is waited for. Raises: Refusal: there is no further step."""
        if self.ended:
            raise _leaving()
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._awaited.add(result)
        result.add_done_callback(self._awaited.discard)
        return result

    async def run(self) -> None:
        """Work until cancelled. What is waited for then, and what is asked for later, is refused."""
        try:
            await self._run()
        finally:
            self.ended = True
            # What is done already, if its callbacks have not run yet, stays as it is.
            for result in (one for one in tuple(self._awaited) if not one.done()):
                result.set_exception(_leaving())
                # Whoever asked may have been cancelled, and does not look at it.
                result.exception()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            if not self._engine.busy or self._engine.stalled:
                await self._asked.wait()
            self._asked.clear()
            work, self._work = self._work, []
            for one in work:
                one()
            self._attempts = [attempt for attempt in self._attempts if not attempt()]
            if self._engine.busy:
                await self._step(clock())

    async def _step(self, now_s: float) -> None:
        try:
            outputs = await self._compute.run(self._engine.step, now_s)
        except Exception as error:
            self._failed += 1
            log.exception("step failed", in_a_row=self._failed)
            await self._lose(self._engine.abandon(), error)
            if self._failed == _FAILED_STEPS:
                raise
            return
        self._failed = 0
        if self.computed is not None:
            tokens = sum(piece.count for piece in self._engine.computed if piece.count > 1)
            self.computed(tokens, asyncio.get_running_loop().time() - now_s)
        await self._absorb(outputs)


def _leaving() -> Refusal:
    failure = Failure(stage=Stage.DECODE, code=DRAINING, message="this instance is leaving", retryable=True)
    return Refusal(failure)
