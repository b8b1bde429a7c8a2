"""Freed memory is kept for the next step.

A step of any model frees what it allocated, and the next one allocates the same again. glibc hands large blocks back to
the system each time, and every 4 KB of them then costs a page fault at its next use: on a CPU that was a quarter of a
training step and half of a clip's encoding.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_BLOCK = 32 << 20  # glibc takes no more: half of a thread's heap
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have this process keep up to 2 GiB that it has freed. To be called before its first thread. Linux and glibc only;
    elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    mallopt(_M_ARENA_MAX, 1)  # one heap for all threads: a thread's own is of 64 MB, and is given back as a whole
