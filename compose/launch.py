"""Starts processes and waits for their end: by executing a command, or by asking the fork server for a child."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.runtime.tether import tether_to
from compose.errors import ComposeError, StartError
from compose.forkserver import MAX_PACKET_BYTES

_ROOM_PERIOD_S = 0.02

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
"""Where the packages lie: every command runs here, so ``python -m services.dit`` finds its module."""


@dataclass(frozen=True)
class Launch:
    """One process to start. Its output goes to the end of ``log``."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A process under way, leader of a process group of its own. ``ended`` resolves to its exit code (-N: signal N)."""

    pid: int
    ended: asyncio.Future[int] = field(compare=False)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group, if it still lives."""
        if not self.ended.done():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return


class Launcher(Protocol):
    """Something that can start processes."""

    async def launch(self, what: Launch) -> Running:
        """Start it.

        Raises:
            StartError: it cannot be started.
        """


def resolved(command: Sequence[str]) -> list[str]:
    """The command with its program's full path: ``python`` is this interpreter, others come from beside it or PATH.

    Raises:
        ComposeError: no such program.
    """
    program, *arguments = command
    if program == "python":
        return [sys.executable, *arguments]
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise ComposeError(
            f"no program {program!r} beside {sys.executable} or on PATH; is the package fully installed?"
        )
    return [found, *arguments]


def execute(
    command: Sequence[str], environment: Mapping[str, str], output: int, pass_fds: Sequence[int] = ()
) -> Running:
    """Run a command whose life is tied to this process's. Must be called from the event loop's (only) thread."""
    process = subprocess.Popen(
        resolved(command),
        cwd=PACKAGE_ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        process_group=0,
        preexec_fn=tether_to(os.getpid()),
    )
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(process.pid)

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        code = process.wait()
        if not ended.done():
            ended.set_result(code)

    loop.add_reader(pidfd, reap)
    return Running(process.pid, ended)


class CommandLauncher:
    """Starts each process by executing its command."""

    async def launch(self, what: Launch) -> Running:
        with what.log.open("ab") as log:
            try:
                return execute(what.command, what.environment, log.fileno())
            except OSError as error:
                raise StartError(f"{what.name}: cannot run {what.command[0]}: {error}") from error


class ForkLauncher:
    """Starts each process, a Python module, as a child of one fork server. A dead server is replaced at the next start.

    Args:
        environment: the fork server's own; what libraries read while they are imported must stand in it.
        preload: modules every process needs, imported as soon as the server runs.
        log: where the server's own output goes.
    """

    def __init__(self, environment: Mapping[str, str], preload: Sequence[str], log: Path) -> None:
        self._environment = environment
        self._preload = list(preload)
        self._log = log
        self._server: Running | None = None
        self._control: socket.socket | None = None
        self._next_id = 0
        self._launching: dict[int, asyncio.Future[Running]] = {}
        self._running: dict[int, asyncio.Future[int]] = {}

    def start(self) -> Running:
        """Start the server and let it import what all its children need."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = ("python", "-m", "compose.forkserver", str(theirs.fileno()))
        with theirs, self._log.open("ab") as log:
            self._server = execute(command, self._environment, log.fileno(), pass_fds=[theirs.fileno()])
        self._control = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive, ours)
        self._sent({"preload": self._preload})
        return self._server

    async def launch(self, what: Launch) -> Running:
        if what.command[:2] != ("python", "-m") or len(what.command) < 3:
            raise ComposeError(f"{what.name}: only 'python -m MODULE' can be forked; leave x-preload out for others")
        if self._control is None:
            self.start()
        self._next_id += 1
        launch_id = self._next_id
        answer: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        request = {"launch": launch_id, "name": what.name, "module": what.command[2], "arguments": what.command[3:]}
        request |= {"environment": dict(what.environment), "preload": what.preload, "log": str(what.log)}
        # While the server imports it takes nothing, and only so much can wait for it.
        while not self._sent(request):  # noqa: ASYNC110 - nobody announces that there is room
            await asyncio.sleep(_ROOM_PERIOD_S)
        self._launching[launch_id] = answer
        return await answer

    async def close(self) -> None:
        """End the server. Its children must have ended before: they would be killed with it."""
        if self._server is None:
            return
        self._server.signal(signal.SIGKILL)
        await self._server.ended
        if self._control is not None:
            self._forget_server(self._control)

    def _sent(self, message: dict[str, Any]) -> bool:
        """Whether there was room for it."""
        if self._control is None:
            raise StartError("the fork server is gone")
        try:
            self._control.send(json.dumps(message).encode())
        except BlockingIOError:
            return False
        except OSError as error:
            raise StartError(f"the fork server does not take requests: {error}; see {self._log}") from error
        return True

    def _receive(self, control: socket.socket) -> None:
        try:
            packet = control.recv(MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._forget_server(control)
            return
        match json.loads(packet):
            case {"launched": launch_id, "pid": pid}:
                self._running[pid] = asyncio.get_running_loop().create_future()
                self._settle(launch_id, lambda answer: answer.set_result(Running(pid, self._running[pid])))
            case {"refused": launch_id, "reason": reason}:
                self._settle(launch_id, lambda answer: answer.set_exception(StartError(reason)))
            case {"ended": pid, "status": status}:
                self._end(pid, os.waitstatus_to_exitcode(status))

    def _settle(self, launch_id: int, settle: Callable[[asyncio.Future[Running]], None]) -> None:
        answer = self._launching.pop(launch_id)
        if not answer.done():
            settle(answer)

    def _end(self, pid: int, code: int) -> None:
        ended = self._running.pop(pid)
        if not ended.done():
            ended.set_result(code)

    def _forget_server(self, control: socket.socket) -> None:
        """The server is gone, and by their tether so are its children."""
        if self._control is not control:
            return
        asyncio.get_running_loop().remove_reader(control.fileno())
        control.close()
        self._control = None
        for launch_id in list(self._launching):
            gone = StartError(f"the fork server died; see {self._log}")
            self._settle(launch_id, lambda answer, gone=gone: answer.set_exception(gone))  # type: ignore[misc]
        for pid in list(self._running):
            self._end(pid, -signal.SIGKILL)
