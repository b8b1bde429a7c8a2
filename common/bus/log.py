"""Where the bus reports what nobody is there to catch: one line per occurrence, never a stack trace for an outage."""

from typing import Protocol

import structlog


class LogSink(Protocol):
    """Takes a line: an event and its details."""

    def __call__(self, event: str, **details: object) -> None: ...


class BusLog:
    """The bus's lines, to structlog or to the sink given."""

    def __init__(self, name: str, sink: LogSink | None = None) -> None:
        self._name = name
        self._sink = sink
        self._logger = structlog.get_logger("bus")

    def info(self, event: str, **details: object) -> None:
        self._write("info", event, details)

    def warning(self, event: str, **details: object) -> None:
        self._write("warning", event, details)

    def failure(self, event: str, error: BaseException, **details: object) -> None:
        """An exception out of a handler: the one case in which the trace is wanted."""
        self._write("error", event, details | {"exc_info": error})

    def _write(self, level: str, event: str, details: dict[str, object]) -> None:
        if self._sink is not None:
            self._sink(event, **details)
        else:
            getattr(self._logger, level)(event, bus=self._name, **details)
