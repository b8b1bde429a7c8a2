"""Processes that a benchmark starts, each of which says in one line that it is ready.

They end with this one, even where it is killed.
"""

import asyncio
import contextlib
import os
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from common.runtime.tether import tether_to
from loadgen.refusal import WrongArgument

START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
# Where our packages lie: ``python -m`` finds them there.
ROOT = Path(__file__).resolve().parent.parent.parent


class BenchmarkError(RuntimeError):
    """What was to be measured did not come about."""


async def child(
    *command: str, environment: Mapping[str, str] | None, stdin: int | None = None, stdout: int | None = None
) -> Process:
    """A process that ends with this one; where this one goes on, ``end`` has to end it."""
    # A group of its own: Ctrl-C is for this process, which ends the others in their order.
    return await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        cwd=ROOT,
        stdin=stdin,
        stdout=stdout,
        process_group=0,
        preexec_fn=tether_to(os.getpid()),
    )


@contextlib.asynccontextmanager
async def started(command: Sequence[str], environment: dict[str, str]) -> AsyncIterator[tuple[Process, str]]:
    """A process and the line by which it said that it is ready; stopped at the end."""
    process = await child(*command, environment=environment, stdin=PIPE, stdout=PIPE)
    try:
        yield process, await line_of(process, START_TIMEOUT_S)
    finally:
        await end(process, _STOP_TIMEOUT_S)


async def end(process: Process, wait_s: float) -> None:
    """Ask it to end, and kill it where that takes longer, or where nobody waits for it any more."""
    try:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), wait_s)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def completed(*command: str, environment: dict[str, str] | None = None) -> int:
    """Run a command to its end, without anything to read; its exit status. Stopped where nobody waits for it."""
    process = await child(*command, environment=environment, stdin=DEVNULL)
    try:
        return await process.wait()
    finally:
        await end(process, _STOP_TIMEOUT_S)


async def line_of(process: Process, timeout_s: float) -> str:
    """The next line of its standard output.

    Raises:
        BenchmarkError: it ended.
        TimeoutError: it said nothing in time.
    """
    if process.stdout is None:
        raise BenchmarkError("the process has no output to read")
    line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
    if not line:
        raise BenchmarkError("a process ended early; what it said stands above")
    return line.decode()


def located(model: str, option: str) -> str:
    """A model that is a local folder by its full path: the processes run elsewhere. Else its name.

    Raises:
        WrongArgument: it looks like a folder and is none.
    """
    looks_like_one = model.startswith((".", "/", "~")) or Path(model).exists()
    return str(located_folder(model, option)) if looks_like_one else model


def located_folder(model: str, option: str) -> Path:
    """A model that has to be a local folder. Raises WrongArgument: it is none."""
    path = Path(model).expanduser()
    if not path.is_dir():
        raise WrongArgument(f"{option} {model}: no such folder")
    return path.resolve()
