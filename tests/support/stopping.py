"""Stopping a process for a while: when this returns it runs no more, not even to the end of what it is at."""

import os
import signal
import time
from pathlib import Path

_DEADLINE_S = 60.0


def stop_process(pid: int) -> None:
    """Send SIGSTOP and wait until every thread has stopped.

    One that is on a core goes on until the signal reaches it, and may answer a request meanwhile.
    """
    os.kill(pid, signal.SIGSTOP)
    end_s = time.monotonic() + _DEADLINE_S
    while not _all_stopped(Path(f"/proc/{pid}/task")):
        assert time.monotonic() < end_s, f"process {pid} does not stop"
        time.sleep(0.001)


def _all_stopped(threads: Path) -> bool:
    try:
        return all(_state(thread) == "T" for thread in threads.iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread has just ended


def _state(thread: Path) -> str:
    """The letter that /proc gives a thread's state, "T" for one that was stopped."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]
