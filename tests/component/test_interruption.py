"""Commands of ``loadgen`` that are asked to end stop what they have started."""

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
