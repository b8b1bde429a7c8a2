"""Tells the cluster monitor how this instance is (TetriInfer, section 3.2): when it changes, and now and then anyway.

Whatever its role: who decodes, the scheduler knows.
"""

import asyncio

import structlog

from common.bus.errors import BusError
from common.bus.port import Bus
from common.engine import Engine
from common.language.held import Sequences
from common.language.stepper import Stepper
from common.language.takeover import Receiving
from common.messages.dispatch import DecodeLoad
from common.messages.subjects import LOAD_REPORTED
from common.policies.language.cluster_monitor import PERIOD_S, REPEAT_S

log = structlog.get_logger()


class LoadReporter:
    """What waits here counts as what runs: its blocks are not free, and it is heavy or light."""

    def __init__(
        self, bus: Bus, instance: str, engine: Engine, stepper: Stepper, sequences: Sequences, receiving: Receiving
    ) -> None:
        self._bus = bus
        self._instance = instance
        self._engine = engine
        self._stepper = stepper
        self._sequences = sequences
        self._receiving = receiving

    async def run(self) -> None:
        """Report until cancelled."""
        clock = asyncio.get_running_loop().time
        told: DecodeLoad | None = None
        told_s = 0.0
        while True:
            load = await self._stepper.between(self._load)
            if load != told or clock() - told_s >= REPEAT_S:
                told, told_s = load, clock()
                try:
                    await self._bus.publish(LOAD_REPORTED, load)
                except BusError as error:
                    log.warning("load not reported", reason=str(error))
            await asyncio.sleep(PERIOD_S)

    def _load(self) -> DecodeLoad:
        here = [held.heavy for held in self._sequences.all if held.request.decode == self._instance]
        waiting = self._engine.waiting_blocks + self._receiving.waiting_blocks
        free = self._engine.memory.available_blocks - waiting
        return DecodeLoad(instance=self._instance, free_blocks=free, heavy=sum(here), light=len(here) - sum(here))
