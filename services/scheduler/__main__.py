"""``python -m services.scheduler``"""

import asyncio

from common.runtime.process import run_service
from common.runtime.settings import load_settings
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import serve


def main() -> None:
    settings = load_settings(SchedulerSettings)

    async def until_stopped(stop: asyncio.Event) -> None:
        await serve(settings, stop)

    run_service(until_stopped, settings)


if __name__ == "__main__":
    main()
