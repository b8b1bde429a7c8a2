"""Ties a process's life to its parent's: Linux kills it the moment the parent is gone, however the parent went.

Gone is it already where the thread ends that made the process: let one do so that lives as long as its process.
Also gives a process the name by which ``ps`` and ``top`` show it.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def tether_to(parent_pid: int) -> Callable[[], None]:
    """A function to call in a freshly forked child of ``parent_pid``.

    The C library is loaded here, in the parent: after a fork there should be as little left to do as possible.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def tether() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        # The parent may have died before the call took effect; then nobody would send the signal any more.
        if os.getppid() != parent_pid:
            os.kill(os.getpid(), signal.SIGKILL)

    return tether


def tether_to_starter() -> None:
    """Call in a process that ``multiprocessing`` has spawned: ties it to the one that did.

    Raises:
        RuntimeError: it is no such process.
    """
    starter = multiprocessing.parent_process()
    if starter is None or starter.pid is None:
        raise RuntimeError("this process was not started by multiprocessing")
    tether_to(starter.pid)()


def show_as(name: str) -> None:
    """Show this process under ``name``; Linux keeps the first 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
