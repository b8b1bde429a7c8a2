"""``python -m tests.support.supervise COMPOSE_FILE FOLDER``: a supervisor of its own process, to be killed by a test.

Prints the fork server's and every replica's process id, one line, once all have started.
"""

import asyncio
import os
import sys
from pathlib import Path

from compose.launch import CommandLauncher, ForkLauncher
from compose.spec import read_stack
from compose.supervisor import Supervisor


async def supervise(compose_file: Path, folder: Path) -> None:
    """Run until killed."""
    forking, executing = ForkLauncher(os.environ, ["json"], folder / "forkserver.log"), CommandLauncher()
    supervisor = Supervisor(
        read_stack(os.environ, compose_file),
        lambda spec: forking if spec.preload else executing,
        lambda spec, index: {**os.environ, "TRIPTYCH_INSTANCE": spec.instances[index], **spec.environment},
        folder,
        print,
    )
    server = forking.start()
    await supervisor.start()
    for replica in supervisor.replicas.values():
        await replica.started.wait()
    pids = [server.pid, *(replica.pid for replica in supervisor.replicas.values())]
    sys.stdout.write(" ".join(map(str, pids)) + "\n")
    sys.stdout.flush()
    await supervisor.failed


if __name__ == "__main__":
    asyncio.run(supervise(Path(sys.argv[1]), Path(sys.argv[2])))
