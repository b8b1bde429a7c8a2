"""Prefill and decode instances as processes of their own, which are started again when they die."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from compose.launch import ForkLauncher
from compose.spec import read_stack
from compose.supervisor import Supervisor

_SERVICE = """  {name}:
    command: [python, -m, services.{name}]
    environment: {{TRIPTYCH_ROLE: "{role}"}}
    deploy: {{replicas: {replicas}, restart_policy: {{condition: any, delay: 0.1s, max_attempts: 1000, window: 1ms}}}}
    stop_grace_period: 5s
    x-preload: [common.language.serve]
"""
_WAIT_S = 120.0


class Processes:
    """The instances by name."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def kill(self, instance: str) -> None:
        """End one as a power cut would; it is there anew a moment later."""
        replica = self._supervisor.replicas[instance]
        async with asyncio.timeout(_WAIT_S):
            while replica.pid is None:  # noqa: ASYNC110 - it is being started
                await asyncio.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(replica.pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def language_processes(
    url: str,
    model: Path,
    folder: Path,
    prefills: int,
    decodes: int,
    role: str,
    mode: str = "by_request",
    dispatch: str = "scheduler",
) -> AsyncIterator[Processes]:
    """``folder`` takes logs; ``role`` is the decode instances', ``mode`` how keys and values are sent."""
    services = _SERVICE.format(name="prefill", role=role, replicas=prefills)
    services += _SERVICE.format(name="decode", role=role, replicas=decodes)
    compose_file = folder / "compose.yaml"
    compose_file.write_text(f"services:\n{services}")
    environment = {
        **os.environ,
        "TRIPTYCH_NATS_URL": url,
        "TRIPTYCH_LANGUAGE_MODEL": str(model),
        "TRIPTYCH_KV_BYTES": str(4 << 20),
        "TRIPTYCH_CHUNK_TOKENS": "32",
        "TRIPTYCH_TRANSFER_MODE": mode,
        "TRIPTYCH_DISPATCH": dispatch,
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "lo",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    forking = ForkLauncher(environment, ["common.language.serve"], folder / "forkserver.log")
    supervisor = Supervisor(
        read_stack({}, compose_file),
        lambda spec: forking,
        lambda spec, index: {**environment, **spec.environment, "TRIPTYCH_INSTANCE": spec.instances[index]},
        folder,
        print,
    )
    forking.start()
    try:
        await supervisor.start()
        supervisor.settled.set()
        yield Processes(supervisor)
    finally:
        await supervisor.stop()
        await forking.close()
