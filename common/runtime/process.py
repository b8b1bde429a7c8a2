"""The life of a service process: settings, logs, an event loop, signals that ask for a drain."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import uvloop

from common.runtime.settings import ServiceSettings, SettingsError, load_settings
from common.runtime.variables import settings_variables, stack_variables, unknown_variables

Settings = TypeVar("Settings", bound=ServiceSettings)


class CannotServe(Exception):
    """The service cannot do its work as it is set up; the message says what to change."""


def run_service(kind: type[Settings], serve: Callable[[Settings, asyncio.Event], Awaitable[None]]) -> None:
    """Read the settings, then run ``serve(settings, stop)`` on a fresh event loop until it returns.

    ``stop`` is set by SIGTERM or SIGINT; ``serve`` then takes no new work, finishes or hands over what it holds,
    and returns. What only a person can mend (settings, a model that does not load) ends the process with one clear
    line and status 2.
    """
    try:
        settings = load_settings(kind)
        configure_logging(settings.log_level)
        _warn_of_unknown_variables(kind)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_done(serve, settings))
    except (SettingsError, CannotServe) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error


def configure_logging(level: str) -> None:
    """Structured logs on standard error: one line per event, key=value."""
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def _warn_of_unknown_variables(kind: type[ServiceSettings]) -> None:
    # An installation without the compose file cannot tell what other services' variables are.
    with contextlib.suppress(OSError):
        known = stack_variables() | settings_variables(kind)
        for name, nearest in unknown_variables(os.environ, known).items():
            hint = {} if nearest is None else {"nearest": nearest}
            structlog.get_logger().warning("variable has no effect: no setting has this name", variable=name, **hint)


async def _until_done(serve: Callable[[Settings, asyncio.Event], Awaitable[None]], settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)
