"""How memory is asked of the system: what was freed is kept for the next step, what is large lies on large pages.

A step of any model frees what it allocated, and the next one allocates the same again. glibc hands large blocks back to
the system each time, and every 4 KB of them then costs a page fault at its next use: on a CPU that was a quarter of a
training step and half of a clip's encoding.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_BLOCK = 32 << 20  # glibc takes no more: half of a thread's heap
_KEPT = (1 << 31) - 1
_LARGE_PAGE = 2 << 20


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


def on_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor on pages of 2 MB, where the system has them to give (Linux, if asked for).

    What is read in strides of kilobytes touches a page for each piece; looking small ones up took longer than reading
    them. Less than one large page is allocated as usual.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    whole = torch.empty(-(-size // _LARGE_PAGE) * _LARGE_PAGE + _LARGE_PAGE, dtype=torch.uint8)
    place = -whole.data_ptr() % _LARGE_PAGE
    kept = whole[place : place + size]
    # Refused, the pages stay small, and everything works.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(kept.data_ptr()), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return kept.view(dtype).view(tuple(shape))
