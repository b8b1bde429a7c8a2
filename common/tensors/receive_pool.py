"""Memory to receive into, touched once and used again.

Fresh memory costs a page fault for every page at its first touch, for a large tensor as much as the transfer itself.
So a buffer goes back to the pool when its tensor is dead, and not before: the tensor's storage holds a reference to
the array it was made from, every view shares that storage, and the array's weak reference is what returns the memory.
"""

import weakref
from collections import deque
from math import prod

import numpy as np
import torch

from common.tensors.memory import Bytes, TensorBytes

_SMALLEST_BYTES = 64 * 1024  # below this, the allocator's own reuse is as good


class ReceivePool:
    """CPU buffers by size class. ``keep_bytes`` bounds what is kept idle; the rest is given back to the system."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._idle: dict[int, list[Bytes]] = {}
        self._idle_bytes = 0
        self._lent: dict[int, tuple[weakref.ref[Bytes], Bytes]] = {}
        self._returned: deque[weakref.ref[Bytes]] = deque()  # their callbacks run on any thread: they only append here
        self._open = True

    @property
    def idle_bytes(self) -> int:
        self._collect()
        return self._idle_bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> TensorBytes:
        """An uninitialized CPU tensor, in memory touched before where there is some."""
        size = prod(shape) * dtype.itemsize
        if size < _SMALLEST_BYTES:
            return TensorBytes(torch.empty(shape, dtype=dtype))
        buffer = self._buffer(size_class(size))
        loan = buffer[:size]
        # Not ``weakref.finalize``, which takes ten times as long.
        reference = weakref.ref(loan, self._returned.append)
        self._lent[id(reference)] = (reference, buffer)
        flat = torch.from_numpy(loan)
        return TensorBytes.over(loan, (flat if dtype is torch.uint8 else flat.view(dtype)).view(shape))

    def close(self) -> None:
        """Keep nothing more. Buffers still lent are freed when their tensors are."""
        self._keep_bytes = 0
        self._collect()
        self._idle.clear()
        self._idle_bytes = 0

    def _buffer(self, size: int) -> Bytes:
        self._collect()
        idle = self._idle.get(size)
        if idle:
            self._idle_bytes -= size
            return idle.pop()
        # Not ``zeros``: ``empty`` asks the kernel for huge pages where the buffer is large, which a copy gains from.
        buffer = np.empty(size, dtype=np.uint8)
        buffer.fill(0)
        return buffer

    def _collect(self) -> None:
        while self._returned:
            _, buffer = self._lent.pop(id(self._returned.popleft()))
            if self._idle_bytes + buffer.nbytes <= self._keep_bytes:
                self._idle.setdefault(buffer.nbytes, []).append(buffer)
                self._idle_bytes += buffer.nbytes


def size_class(size_bytes: int) -> int:
    """``size_bytes`` rounded up, by at most a quarter, so that tensors of nearly one size share buffers."""
    step = 1 << max(12, (size_bytes - 1).bit_length() - 3)
    return -(-size_bytes // step) * step
