"""Shows people what matters of the services' logs while they are written: warnings, errors, tracebacks.

The services write straight into files, so none of them ever waits for whoever reads along.
"""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

_PERIOD_S = 0.25
_LIMIT_BYTES = 64 * 1024 * 1024
_LEVEL = re.compile(r"\blevel=(\w+)|^\[\d+\] \S+ \S+ \[(\w+)\]")
_QUIET = {"debug", "info", "dbg", "trc", "inf"}


def level_of(line: str) -> str | None:
    """The level a log line states (ours, or the broker's), in lower case; None for others, such as tracebacks."""
    found = _LEVEL.search(line)
    return (found[1] or found[2]).lower() if found else None


class LogFollower:
    """Follows every log of a folder and reports the lines worth a person's attention.

    Args:
        folder: where the ``NAME.log`` files are.
        verbose: report every line, not only those that warn.
    """

    def __init__(self, folder: Path, report: Callable[[str], None], verbose: bool = False) -> None:
        self._folder, self._report, self._verbose = folder, report, verbose
        self._read_bytes: dict[Path, int] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            self.catch_up()
            await asyncio.sleep(_PERIOD_S)

    def catch_up(self) -> None:
        """Report what was written since the last time."""
        for log in sorted(self._folder.glob("*.log")):
            if log.name == "health.log":
                continue
            for line in self._new_lines(log):
                if self._verbose or level_of(line) not in _QUIET:
                    self._report(f"{log.stem} | {line}")

    def _new_lines(self, log: Path) -> list[str]:
        position = self._read_bytes.get(log, 0)
        with log.open("r+b") as file:
            file.seek(position)
            text = file.read(1024 * 1024)
            complete = text[: text.rfind(b"\n") + 1]
            position += len(complete)
            if position > _LIMIT_BYTES and len(complete) == len(text):
                # Writers append, so they go on at the new end.
                file.truncate(0)
                position = 0
        self._read_bytes[log] = position
        return [line for line in complete.decode(errors="replace").splitlines() if line.strip()]
