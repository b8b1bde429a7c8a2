"""The measuring processes, one for each slot: started with a DiT worker's environment, asked over their pipes."""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import IO, Any

from common.runtime.tether import tether_to
from compose.errors import StartError
from compose.launch import PACKAGE_ROOT
from compose.profiling.plan import Plan
from compose.spec import read_stack

_START_TIMEOUT_S = 120.0
# One answer may be many steps of a large video on a CPU.
_ANSWER_TIMEOUT_S = 3600.0
_STOP_TIMEOUT_S = 5.0


class MeasuringProcess:
    """One of them. ``gpus``, ``device`` and ``address`` are what it has said of itself."""

    def __init__(self, name: str, process: Process, log: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._log = log
        self.gpus = 0
        self.device = ""
        self.address = ""

    async def hello(self) -> None:
        """Wait until it can be asked. Raises StartError."""
        about = await self._answer(_START_TIMEOUT_S)
        self.gpus, self.device, self.address = int(about["gpus"]), str(about["device"]), str(about["address"])

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something; its answer.

        Raises:
            StartError: it could not, or it died.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                await self._process.stdin.drain()
        return await self._answer(_ANSWER_TIMEOUT_S)

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        line = b""
        if self._process.stdout is not None:
            try:
                line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
            except TimeoutError as error:
                raise StartError(f"the measuring process {self.name} said nothing for {timeout_s:g} s") from error
        if not line:
            raise StartError(f"the measuring process {self.name} died: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StartError(f"the measuring process {self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it left no message"

    async def end(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        self._log.close()


class Crew:
    """The processes by slot; more are started as they are needed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.members: list[MeasuringProcess] = []

    async def grow(self, slots: int) -> None:
        """Have one process for each of so many slots. Raises StartError."""
        new = [await self._start(slot) for slot in range(len(self.members), slots)]
        await asyncio.gather(*(member.hello() for member in new))

    async def _start(self, slot: int) -> MeasuringProcess:
        name = f"slot-{slot}"
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the member's end
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "compose.profiling.member"),
            cwd=PACKAGE_ROOT,
            env=self._environment(name, slot),
            stdin=PIPE,
            stdout=PIPE,
            stderr=log,
            # Ctrl-C is for this process alone, which then ends the others.
            process_group=0,
            preexec_fn=tether_to(os.getpid()),
        )
        member = MeasuringProcess(name, process, log)
        self.members.append(member)
        return member

    def _environment(self, name: str, slot: int) -> dict[str, str]:
        """What a DiT worker of ``triptych up`` gets, from the same file."""
        options = self._plan.options
        asked = {
            "TRIPTYCH_VIDEO_MODEL": self._plan.model,
            "TRIPTYCH_THREADS": str(options.threads),
            # A worker finds the GPU of its slot itself.
            "TRIPTYCH_DEVICE": "cpu" if options.device == "cpu" else "auto",
        }
        environment = read_stack({**os.environ, **asked}).services["dit"].environment
        return {**os.environ, **environment, "TRIPTYCH_INSTANCE": name, "TRIPTYCH_SLOT": str(slot)}


@contextlib.asynccontextmanager
async def crew_of(plan: Plan) -> AsyncIterator[Crew]:
    """An empty crew; whoever has joined it is ended with the block."""
    crew = Crew(plan)
    try:
        yield crew
    finally:
        await asyncio.gather(*(member.end() for member in crew.members))
