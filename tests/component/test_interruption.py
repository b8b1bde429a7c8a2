"""Commands of ``loadgen`` that are asked to end stop what they have started, and what is killed leaves nobody."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loadgen.bench.process import ROOT, end, line_of, started

_DEADLINE_S = 120.0
_GONE_S = 30.0
# Says so when it is asked to end, and does not.
_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("up", flush=True)
while True:
    time.sleep(60)
"""


def test_a_benchmark_that_is_asked_to_end_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "loadgen", "bench", "bus", "--pairs", "100000"]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as bench:
        us = psutil.Process(bench.pid)
        # The broker, who answers, and then a connection to the broker.
        _until(lambda: len(us.children()) == 2 and any(one.status == "ESTABLISHED" for one in us.net_connections()))
        children = us.children()
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(_DEADLINE_S) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=_DEADLINE_S)[1]
    assert not list(tmp_path.iterdir()), "the broker's files went too"


# When there is a second one, the first has said that it is up.
_STARTS_TWO = f"""
import asyncio, os, sys
from loadgen.bench.process import started

COMMAND = [sys.executable, "-c", {_STUBBORN!r}]

async def main():
    async with started(COMMAND, dict(os.environ)), started(COMMAND, dict(os.environ)):
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("words", "most"),
    [
        # The broker, and who answers.
        (("-m", "loadgen", "bench", "bus", "--pairs", "100000"), 2),
        (("-c", _STARTS_TWO), 2),
        # Two that simulate, and multiprocessing's own.
        (("-m", "loadgen", "sim", "--workers", "2", "--gpus", "64", "--json", "{}/out.json"), 3),
    ],
)
def test_nobody_outlives_a_command_that_is_killed(words: tuple[str, ...], most: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, *(word.replace("{}", str(tmp_path)) for word in words)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as killed:
        us = psutil.Process(killed.pid)
        try:
            _until(lambda: len(us.children()) == most)
            # A program of its own, no copy of ours any more.
            children = us.children()
            _until(lambda: all(child.cmdline() != us.cmdline() for child in children))
        finally:
            killed.kill()
    alive = psutil.wait_procs(children, timeout=_GONE_S)[1]
    for child in alive:
        child.kill()
    assert not alive


async def test_nobody_is_left_behind_where_the_wait_for_its_end_is_broken_off() -> None:
    async with started([sys.executable, "-c", _STUBBORN], dict(os.environ)) as (process, _):
        ending = asyncio.create_task(end(process, wait_s=3600.0))
        assert await line_of(process, _DEADLINE_S) == "asked\n"
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert process.returncode == -signal.SIGKILL


def _until(there: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _DEADLINE_S
    while not there():
        assert time.monotonic() < end_s, "it did not come about in time"
        time.sleep(0.02)
