"""The cluster monitor, live (TetriInfer, section 3.2): decode instances report, all prefill instances are told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.cluster import LanguageRole
from common.messages.dispatch import DecodeLoad, DecodeLoads
from common.messages.subjects import DECODE_LOADS, LOAD_REPORTED
from common.policies.language import decode_dispatch as policy
from common.policies.language.cluster_monitor import (
    PERIOD_S,
    REPEAT_S,
    ClusterMonitor,
    LoadReported,
    PeriodPassed,
    StoppedDecoding,
)

log = structlog.get_logger()


class DecodeLoadMonitor:
    """Told who comes and goes, it broadcasts while ``running``, as long as anybody prefills who does not decode too."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._monitor = ClusterMonitor()
        self._decoding: set[str] = set()
        self._prefilling: set[str] = set()
        self._broadcasts: list[policy.LoadsBroadcast] = []
        self._stirred = asyncio.Event()
        self._told: tuple[policy.DecodeLoad, ...] = ()
        self._told_s = float("-inf")
        self._clock = asyncio.get_running_loop().time

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hear and tell while the block runs."""
        subscription = await self._bus.subscribe(LOAD_REPORTED, self._reported)
        try:
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(self._tell_always(), name="tell decode loads")
                try:
                    yield
                finally:
                    telling.cancel()
        finally:
            await subscription.stop(deadline_s=1.0)

    def has_roles(self, instance: str, roles: Collection[LanguageRole]) -> None:
        """From now on it takes new sequences for these; none: it takes none, or is gone."""
        self._decoding.discard(instance)
        self._prefilling.discard(instance)
        if LanguageRole.DECODE in roles:
            self._decoding.add(instance)
        else:
            self._broadcasts += self._monitor.handle(StoppedDecoding(instance), self._clock())
            if roles:
                self._prefilling.add(instance)
        # Whoever is new is to hear it, whether it changes or not.
        self._told_s = float("-inf")
        self._stirred.set()

    def _reported(self, report: DecodeLoad) -> None:
        if report.instance in self._decoding:
            load = policy.DecodeLoad(report.instance, report.free_blocks, report.heavy, report.light)
            self._monitor.handle(LoadReported(load), self._clock())

    async def _tell_always(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                # ``wait_for`` forgets, before Python 3.12, a cancellation that comes together with the event.
                async with asyncio.timeout(PERIOD_S):
                    await self._stirred.wait()
            self._stirred.clear()
            broadcasts, self._broadcasts = self._broadcasts, []
            for broadcast in broadcasts or self._monitor.handle(PeriodPassed(), self._clock()):
                await self._tell(broadcast.loads)

    async def _tell(self, loads: tuple[policy.DecodeLoad, ...]) -> None:
        unchanged = loads == self._told and self._clock() - self._told_s < REPEAT_S
        if unchanged or not self._prefilling:
            return
        self._told, self._told_s = loads, self._clock()
        told = (
            DecodeLoad(instance=one.instance, free_blocks=one.free_blocks, heavy=one.heavy, light=one.light)
            for one in loads
        )
        try:
            await self._bus.publish(DECODE_LOADS, DecodeLoads(loads=tuple(told)))
        except BusError as error:
            log.warning("decode loads not told", reason=str(error))
