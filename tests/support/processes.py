"""Services as real processes, forked from one server over one broker: started, killed and started again by a test."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.cluster import Member, MemberState
from common.messages.subjects import MEMBERS
from compose.launch import ForkLauncher, Launch, Running
from tests.support.nats_server import NatsServer

WAIT_S = 120.0
_PRELOAD = ("common.runtime.worker", "common.models.opensora.pipeline")


class Processes:
    """Processes by instance, such as ``dit-1``; each writes a log of its name."""

    def __init__(
        self, server: NatsServer, bus: Bus, model: Path, folder: Path, preload: Sequence[str] = _PRELOAD
    ) -> None:
        self.bus = bus
        self._preload = tuple(preload)
        self._folder = folder
        self._environment = os.environ | {
            "TRIPTYCH_NATS_URL": server.url,
            "TRIPTYCH_VIDEO_MODEL": str(model),
            "TRIPTYCH_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self._launcher = ForkLauncher(self._environment, self._preload, folder / "forkserver.log")
        self._running: dict[str, Running] = {}

    async def start(self, instance: str, **settings: str) -> None:
        """Start a process, unless it runs; it is not waited for."""
        running = self._running.get(instance)
        if running is not None and not running.ended.done():
            return
        service, _, slot = instance.rpartition("-")
        environment = self._environment | {"TRIPTYCH_INSTANCE": instance, "TRIPTYCH_SLOT": slot} | settings
        command = ("python", "-m", f"services.{service}")
        launch = Launch(instance, command, environment, self.log(instance), self._preload)
        self._running[instance] = await self._launcher.launch(launch)

    async def ready(self, *instances: str) -> dict[str, Member]:
        """The members' records, once the newest life of each takes work."""
        members: dict[str, Member] = {}
        async with asyncio.timeout(WAIT_S):
            for instance in instances:
                while (member := await self._if_ready(instance)) is None:  # noqa: ASYNC110 - asked again, briefly
                    await asyncio.sleep(0.02)
                members[instance] = member
        return members

    async def _if_ready(self, instance: str) -> Member | None:
        with contextlib.suppress(BusError):
            member = (await self.bus.get(MEMBERS, instance)).value
            if member.pid == self._running[instance].pid and member.state is MemberState.READY:
                return member
        return None

    async def kill(self, instance: str) -> None:
        self.signal(instance, signal.SIGKILL)
        await self.ended(instance)

    def signal(self, instance: str, number: signal.Signals) -> None:
        self._running[instance].signal(number)

    async def ended(self, instance: str) -> int:
        return await asyncio.wait_for(asyncio.shield(self._running[instance].ended), WAIT_S)

    def log(self, instance: str) -> Path:
        return self._folder / f"{instance}.log"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have all that were started meanwhile gone at the block's end."""
        self._launcher.start()
        try:
            yield
        finally:
            for running in self._running.values():
                running.signal(signal.SIGKILL)
            for running in self._running.values():
                await running.ended
            await self._launcher.close()
