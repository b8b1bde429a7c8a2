"""A language instance in the test's own process, with its engine to look at, and one in a process of its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.language.instance import LanguageInstance
from common.language.loading import LoadedModel, load_model
from common.language.settings import LanguageSettings
from common.mempool.allocator import BlockAllocator
from common.messages.cluster import LanguageRole, Service
from common.runtime.membership import Registration
from common.runtime.worker import Equipment, run_worker
from tests.support.language import FUSED

_WAIT_S = 120.0


@dataclass
class Watched:
    """An instance whose books can be read. ``stop`` asks it to drain."""

    instance: LanguageInstance
    model: LoadedModel
    stop: asyncio.Event

    @property
    def books(self) -> BlockAllocator:
        return self.model.engine.allocator

    async def settled(self) -> None:
        """Return once nobody holds a block any more, but for what is kept for later sequences."""
        async with asyncio.timeout(_WAIT_S):
            while self.books.free_blocks + self.books.idle_blocks != self.books.blocks:  # noqa: ASYNC110 - the books have no bell
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def language_instance(
    url: str, name: str, folder: Path, roles: tuple[LanguageRole, ...] = FUSED, **settings: Any
) -> AsyncIterator[Watched]:
    """An instance that takes work while the block runs."""
    service = Service.PREFILL if roles == (LanguageRole.PREFILL,) else Service.DECODE
    own = LanguageSettings(nats_url=url, instance=name, language_model=str(folder), **settings)
    stop = asyncio.Event()
    watched: list[Watched] = []
    up: asyncio.Future[Watched] = asyncio.get_running_loop().create_future()

    def make(equipment: Equipment, model: LoadedModel) -> LanguageInstance:
        made = LanguageInstance(equipment, model, own)
        watched.append(Watched(made, model, stop))
        return made

    async def announce(registration: Registration, model: LoadedModel) -> None:
        await registration.ready(language_model=model.info, roles=roles)
        watched[0].instance.roles.announced(registration)
        up.set_result(watched[0])

    running = asyncio.create_task(
        run_worker(own, stop, service, lambda device, dtype: load_model(own, device, dtype), make, announce)
    )
    await asyncio.wait((running, up), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    try:
        yield await up
    finally:
        stop.set()
        await running
