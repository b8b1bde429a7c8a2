"""When the language instances of a stack are in use, by the processor time of their processes (Linux)."""

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadgen.bench.process import BenchmarkError

_LOOK_EVERY_S = 0.05
# A computing instance takes nearly all of a look's time, an idle one a thousandth.
_IN_USE = 0.2
_LANGUAGE = re.compile(r"(?:prefill|decode)-\d+")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Use:
    """One instance's: from when until when, in seconds from a burst's beginning, and its processor time."""

    first_s: float = 0.0
    last_s: float = 0.0
    cpu_s: float = 0.0


@dataclass
class InstanceUse:
    """``seen``: by instance, at each look, when it was and how much processor time the process had had, in seconds."""

    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def of(self, begin_s: float) -> dict[str, Use]:
        """By instance, what it did since then."""
        return {name: use_of(looks, begin_s) for name, looks in self.seen.items()}


def use_of(looks: Sequence[tuple[float, float]], begin_s: float) -> Use:
    """Between two looks it was in use if it took more than a fifth of that time; one that did little, all the time."""
    (start_s, start_cpu_s), (end_s, end_cpu_s) = looks[0], looks[-1]
    if end_cpu_s == start_cpu_s:
        return Use()
    spans = [
        (before_s, after_s)
        for (before_s, before_cpu_s), (after_s, after_cpu_s) in itertools.pairwise(looks)
        if after_cpu_s - before_cpu_s > _IN_USE * (after_s - before_s)
    ] or [(start_s, end_s)]
    return Use(max(0.0, spans[0][0] - begin_s), spans[-1][1] - begin_s, end_cpu_s - start_cpu_s)


@contextlib.asynccontextmanager
async def watching(stack_pid: int) -> AsyncIterator[InstanceUse]:
    """Look while the block runs. Raises BenchmarkError: at its end an instance is gone."""
    processes = language_processes(stack_pid)
    use = InstanceUse({name: [] for name in processes})
    _look(processes, use)

    async def look_on() -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            _look(processes, use)

    looking = asyncio.create_task(look_on(), name="look at instances")
    try:
        yield use
        _look(processes, use)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def language_processes(stack_pid: int) -> dict[str, int]:
    """The prefill and decode instances among a process's descendants: their process ids by their names."""
    children: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                name, fields = _stat(int(folder.name))
                children.setdefault(int(fields[1]), []).append((int(folder.name), name))
    found, ahead = {}, [stack_pid]
    while ahead:
        for pid, name in children.get(ahead.pop(), ()):
            ahead.append(pid)
            if _LANGUAGE.fullmatch(name):
                found[name] = pid
    return found


def _look(processes: dict[str, int], use: InstanceUse) -> None:
    for name, pid in processes.items():
        try:
            _, fields = _stat(pid)
        except OSError as error:
            raise BenchmarkError(f"{name} is gone") from error
        use.seen[name].append((time.monotonic(), (int(fields[11]) + int(fields[12])) * _TICK_S))


def _stat(pid: int) -> tuple[str, list[str]]:
    """A process's name, and what stands behind it (proc(5)): state, parent, ..."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 1 :].split()
