"""The process of a language instance, whichever its role."""

import asyncio
from functools import partial

from common.language.instance import LanguageInstance
from common.language.loading import LoadedModel, load_model
from common.language.settings import Batching, LanguageSettings
from common.messages.cluster import LanguageRole, Service
from common.runtime.membership import Registration
from common.runtime.process import CannotServe
from common.runtime.worker import Equipment, run_worker


async def serve_language(
    settings: LanguageSettings, stop: asyncio.Event, service: Service, roles: tuple[LanguageRole, ...]
) -> None:
    """Load the language model, join the cluster with ``roles``, answer until ``stop``, then finish what is under way.

    Raises:
        CannotServe: the model cannot be loaded, or a fixed batch is asked of who does not do both phases.
    """
    if settings.batching is Batching.FIXED and len(roles) == 1:
        raise CannotServe("TRIPTYCH_BATCHING: a fixed batch is of whole answers; use it where no instance has one role")

    made: list[LanguageInstance] = []

    def make(equipment: Equipment, model: LoadedModel) -> LanguageInstance:
        made.append(LanguageInstance(equipment, model, settings))
        return made[0]

    async def announce(registration: Registration, model: LoadedModel) -> None:
        await registration.ready(language_model=model.info, roles=roles)
        made[0].roles.announced(registration)

    await run_worker(settings, stop, service, partial(load_model, settings), make, announce)
