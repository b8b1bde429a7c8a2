"""Whether the scheduler's trees of what instances have cached (MemServe, section 6) are what instances have."""

import asyncio
import time
from collections.abc import Sequence

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.kv_index import AskIndex, AskView
from common.messages.subjects import TELL_INDEX, TELL_VIEW
from loadgen.bench.process import BenchmarkError

_ASK_S = 5.0
_AGAIN_S = 0.1

# An instance's life, the number of its last change, how many blocks it has and their digest.
State = tuple[int, int, int, int]


async def agreement(bus: Bus, instances: Sequence[str], deadline_s: float) -> dict[str, int]:
    """Wait until both agree on all instances, while nothing is asked of them; how many blocks each has.

    Raises:
        BenchmarkError: they do not within ``deadline_s`` seconds; the message has both sides.
    """
    end_s = time.monotonic() + deadline_s
    while True:
        try:
            viewed = await _viewed(bus)
            there = {instance: await _there(bus, instance) for instance in instances}
            # An instance that has had nothing yet has told nothing, unless it was asked.
            if all(viewed.get(instance) == state for instance, state in there.items()):
                return {instance: state[2] for instance, state in there.items()}
            difference = f"the scheduler has {viewed}, the instances {there} (life, change, blocks, digest)"
        except BusError as error:
            difference = f"{type(error).__name__}: {error}"
        if time.monotonic() > end_s:
            raise BenchmarkError(f"no agreement within {deadline_s:g} s: {difference}")
        await asyncio.sleep(_AGAIN_S)


async def _viewed(bus: Bus) -> dict[str, State | None]:
    told = await bus.request(TELL_VIEW, AskView(), deadline_s=_ASK_S)
    return {
        view.instance: None if view.awaited else (view.incarnation, view.number, view.blocks, view.digest)
        for view in told.instances
    }


async def _there(bus: Bus, instance: str) -> State:
    told = await bus.request(TELL_INDEX, AskIndex(part=0), instance, deadline_s=_ASK_S)
    return told.incarnation, told.number, told.blocks, told.digest
