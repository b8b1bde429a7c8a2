"""A run's events on record: JSON lines that `loadgen.simulator.replay` reads, so that decisions can be played again."""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Self

from common.policies.video.events import Event


class EventRecord:
    """Appends each event to a file, in the order in which the policy hears them.

    Lines go to the operating system as they come, some hundred bytes each, so a killed scheduler loses none.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError: the file cannot be written to."""
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, at_s: float, event: Event) -> None:
        fields = {"at_s": at_s, "event": type(event).__name__, **dataclasses.asdict(event)}
        self._file.write(f"{json.dumps(fields, separators=(',', ':'))}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
