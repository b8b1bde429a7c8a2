"""``triptych up``: the stack in the foreground."""

import asyncio
import os
import signal
import sys

from compose.environment import overruled, set_aside, unknown
from compose.errors import StackError
from compose.local import StackOptions, running_stack
from compose.supervisor import Supervisor


class Interruption:
    """Signals as a person means them: the first asks for an orderly end, the second for an end at once."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._supervisor: Supervisor | None = None
        self.asked = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._handle)

    def hurries(self, supervisor: Supervisor) -> None:
        """From the second signal on, this supervisor stops without grace."""
        self._supervisor = supervisor

    def _handle(self) -> None:
        if self.asked:
            if self._supervisor is not None:
                self._supervisor.hurry.set()
            return
        self.asked = True
        if self._task is not None:
            self._task.cancel()


def report(line: str) -> None:
    """Tell the person at the terminal."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def run_up(options: StackOptions) -> int:
    """Run the stack until asked to stop; returns the exit code."""
    return asyncio.run(_up(options))


async def _up(options: StackOptions) -> int:
    interruption = Interruption()
    for line in (*unknown(os.environ, options), *overruled(os.environ, options), *set_aside(os.environ, options)):
        report(line)
    try:
        async with running_stack(options, report, interruption.hurries) as stack:
            sys.stdout.write(f"ready {stack.base_url}\n")
            sys.stdout.flush()
            await stack.supervisor.failed
    except asyncio.CancelledError:
        if not interruption.asked:
            raise
        return 0
    except StackError as error:
        report(f"triptych: {error}")
        return error.status
    return 0
