"""Keeps the services of a stack running: starts them in order, starts again what dies, stops them in reverse order."""

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compose.errors import CrashLoopError, StackError, StartError
from compose.launch import Launch, Launcher, Running, execute
from compose.spec import Healthcheck, RestartPolicy, ServiceSpec, StackSpec

Report = Callable[[str], None]

_LAUNCH_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 10.0
# What fails while the stack comes up is wrong, not unlucky: a few quick words help more than patience.
_ATTEMPTS_TO_START = 2
# The exit code of a service that only a person can mend (``common.runtime.process.run_service``): wrong settings.
_WRONGLY_SET_UP = 2


class Replica:
    """One lasting place in the stack (``dit-1``), filled by one process after another.

    Args:
        what: how to start a process of it.
        launcher: what starts it.
        restart: when to start the next one.
        grace_s: how long a process may take to end itself before it is killed.
        settled: set once the stack is up; until then a second death is one too many.
        report: told what a person should know.
    """

    def __init__(
        self,
        what: Launch,
        launcher: Launcher,
        restart: RestartPolicy,
        grace_s: float,
        settled: asyncio.Event,
        report: Report,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = what.name
        self.started = asyncio.Event()
        self._what, self._launcher, self._restart, self._grace_s = what, launcher, restart, grace_s
        self._settled, self._report, self._clock = settled, report, clock
        self._stopping = asyncio.Event()
        self._process: Running | None = None
        self._deaths_s: deque[float] = deque(maxlen=restart.max_attempts)

    @property
    def pid(self) -> int | None:
        """The process that fills this place now."""
        return self._process.pid if self._process else None

    @property
    def log(self) -> Path:
        return self._what.log

    async def run(self) -> None:
        """Fill the place until told to stop.

        Raises:
            CrashLoopError: too many deaths in too short a time, or settings with which it cannot start.
            StartError: a process could not even be started.
        """
        while not self._stopping.is_set():
            async with asyncio.timeout(_LAUNCH_TIMEOUT_S):
                self._process = await self._launcher.launch(self._what)
            self.started.set()
            if self._stopping.is_set():
                self._process.signal(signal.SIGKILL)
            code = await self._process.ended
            self._process = None
            if self._stopping.is_set() or not self._wants_another(code):
                return
            delay_s = self._delay_after_death_s(code)
            again = f"again in {delay_s:g} s" if delay_s else "again"
            self._report(f"{self.name} {_how(code)}; starting it {again}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    async def stop(self, hurry: asyncio.Event) -> None:
        """End it: politely, then after the grace period (or once ``hurry`` is set) by force."""
        self._stopping.set()
        if self._process is None:
            return
        process = self._process
        process.signal(signal.SIGTERM)
        hurried = asyncio.create_task(hurry.wait())
        either: set[asyncio.Future[Any]] = {process.ended, hurried}
        try:
            await asyncio.wait(either, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()
        if not process.ended.done():
            if not hurry.is_set():
                self._report(f"{self.name} did not end within {self._grace_s:g} s; killing it")
            process.signal(signal.SIGKILL)
            await asyncio.wait({process.ended}, timeout=_KILL_TIMEOUT_S)

    def _wants_another(self, code: int) -> bool:
        return self._restart.condition == "any" or (self._restart.condition == "on-failure" and code != 0)

    def _delay_after_death_s(self, code: int) -> float:
        if code == _WRONGLY_SET_UP and not self._settled.is_set():
            raise CrashLoopError(f"{self.name} cannot start as it is set up. The end of its log:\n{tail(self.log)}")
        now_s = self._clock()
        self._deaths_s.append(now_s)
        recent = sum(now_s - death_s <= self._restart.window_s for death_s in self._deaths_s)
        most = self._restart.max_attempts
        if recent >= (most if self._settled.is_set() else min(_ATTEMPTS_TO_START, most)):
            raise CrashLoopError(
                f"{self.name} died {recent} times within {self._restart.window_s:g} s (the last one {_how(code)}); "
                f"giving up. The end of its log:\n{tail(self.log)}"
            )
        return 0.0 if recent == 1 else self._restart.delay_s * 2.0 ** (recent - 2)


class Supervisor:
    """The replicas of a whole stack.

    Args:
        stack: the services.
        launcher_of: what starts the processes of a service.
        environment_of: the whole environment of one replica, by service and index.
        logs: the folder for ``NAME.log`` of each replica.
        report: told what a person should know.
    """

    def __init__(
        self,
        stack: StackSpec,
        launcher_of: Callable[[ServiceSpec], Launcher],
        environment_of: Callable[[ServiceSpec, int], Mapping[str, str]],
        logs: Path,
        report: Report,
    ) -> None:
        self._stack = stack
        self._report = report
        self._logs = logs
        self.hurry = asyncio.Event()
        self.settled = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self.replicas: dict[str, Replica] = {}
        self._of_service: dict[str, list[Replica]] = {}
        self._environments: dict[str, Mapping[str, str]] = {}
        for spec in stack.services.values():
            self._of_service[spec.name] = []
            for index, name in enumerate(spec.instances):
                environment = environment_of(spec, index)
                what = Launch(name, spec.command, environment, logs / f"{name}.log", spec.preload)
                launcher, grace_s = launcher_of(spec), spec.stop_grace_period_s
                replica = Replica(what, launcher, spec.restart, grace_s, self.settled, report)
                self.replicas[name] = replica
                self._of_service[spec.name].append(replica)
                self._environments.setdefault(spec.name, environment)

    async def start(self) -> None:
        """Start every service, each as soon as what it depends on stands.

        Raises:
            StartError: something that others wait for did not become healthy.
        """
        healthy: dict[str, asyncio.Task[None]] = {}
        try:
            for level in self._stack.levels:
                for name in level:
                    await self._dependencies_of(self._stack.services[name], healthy)
                    for replica in self._of_service[name]:
                        self._tasks.append(asyncio.create_task(self._keep(replica), name=replica.name))
                    health = self._stack.services[name].healthcheck
                    if health is not None and self._is_waited_for(name):
                        healthy[name] = asyncio.create_task(self._wait_healthy(name, health), name=f"{name}-health")
        finally:
            for waiting in healthy.values():
                waiting.cancel()

    async def stop(self) -> None:
        """Stop everything, dependants first, each level together."""
        for level in reversed(self._stack.levels):
            await self._stop_all(replica for name in level for replica in self._of_service[name])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stop_all(self, replicas: Iterable[Replica]) -> None:
        async with asyncio.TaskGroup() as stopping:
            for replica in replicas:
                stopping.create_task(replica.stop(self.hurry))

    async def _keep(self, replica: Replica) -> None:
        try:
            await replica.run()
        except (StackError, TimeoutError) as error:
            if not self.failed.done():
                reason = error if isinstance(error, StackError) else StartError(f"{replica.name} did not start in time")
                self.failed.set_exception(reason)

    async def _dependencies_of(self, spec: ServiceSpec, healthy: Mapping[str, asyncio.Task[None]]) -> None:
        for name, must_be_healthy in spec.depends_on.items():
            if must_be_healthy:
                await asyncio.shield(healthy[name])

    def _is_waited_for(self, name: str) -> bool:
        return any(spec.depends_on.get(name, False) for spec in self._stack.services.values())

    async def _wait_healthy(self, name: str, health: Healthcheck) -> None:
        first = self._of_service[name][0]
        try:
            async with asyncio.timeout(health.start_period_s):
                await first.started.wait()
                await self._until_healthy(name, health)
        except TimeoutError:
            raise StartError(
                f"{name} was not healthy after {health.start_period_s:g} s. The end of its log:\n{tail(first.log)}"
            ) from None

    async def _until_healthy(self, name: str, health: Healthcheck) -> None:
        # Health is asked for, nobody announces it.
        while not await self._probe(name, health):  # noqa: ASYNC110
            await asyncio.sleep(health.start_interval_s)

    async def _probe(self, name: str, health: Healthcheck) -> bool:
        with (self._logs / "health.log").open("ab") as log:
            probe = execute(health.command, self._environments[name], log.fileno())
        try:
            async with asyncio.timeout(health.timeout_s):
                return await asyncio.shield(probe.ended) == 0
        except TimeoutError:
            return False
        finally:
            probe.signal(signal.SIGKILL)
            await asyncio.wait({probe.ended}, timeout=_KILL_TIMEOUT_S)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file, indented."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (it wrote nothing)"


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
