"""What a process keeps for others: by count of uses, under a lease. Pure: the time is an argument."""

import heapq
from dataclasses import dataclass

import torch

from common.tensors.memory import TensorBytes


@dataclass(slots=True)
class Export:
    tensor_id: int
    memory: TensorBytes
    uses_left: int | None
    lease_ends_s: float
    ready: torch.cuda.Event | None = None
    """On a CUDA device: done once the kernels that make the tensor are."""


class ExportTable:
    """Exports by id. Every way out of the table is one ``drop``, so count and bytes cannot drift."""

    def __init__(self, first_id: int) -> None:
        """``first_id`` should be random, so that no other life of this process used the ids that follow."""
        self._next_id = first_id
        self._exports: dict[int, Export] = {}
        self._leases: list[tuple[float, int]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._exports)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def add(
        self, memory: TensorBytes, uses: int | None, lease_ends_s: float, ready: torch.cuda.Event | None = None
    ) -> Export:
        export = Export(self._next_id, memory, uses, lease_ends_s, ready)
        self._next_id += 1
        self._exports[export.tensor_id] = export
        self._bytes += memory.size_bytes
        heapq.heappush(self._leases, (lease_ends_s, export.tensor_id))
        return export

    def find(self, tensor_id: int, now_s: float) -> Export | None:
        """The export, unless its lease has run out."""
        export = self._exports.get(tensor_id)
        return export if export is not None and export.lease_ends_s > now_s else None

    def taken(self, tensor_id: int) -> None:
        """One use is over."""
        export = self._exports.get(tensor_id)
        if export is None or export.uses_left is None:
            return
        export.uses_left -= 1
        if export.uses_left <= 0:
            self.drop(tensor_id)

    def drop(self, tensor_id: int) -> None:
        export = self._exports.pop(tensor_id, None)
        if export is not None:
            self._bytes -= export.memory.size_bytes

    def renew(self, export: Export, lease_ends_s: float) -> None:
        export.lease_ends_s = lease_ends_s
        heapq.heappush(self._leases, (lease_ends_s, export.tensor_id))

    def expire(self, now_s: float) -> float | None:
        """Drop what has run out; when to come again, or None with nothing left to wait for."""
        while self._leases:
            ends_s, tensor_id = self._leases[0]
            export = self._exports.get(tensor_id)
            current = export is not None and export.lease_ends_s == ends_s
            if current and ends_s > now_s:
                return ends_s
            heapq.heappop(self._leases)
            if current:
                self.drop(tensor_id)
        return None

    def clear(self) -> None:
        self._exports.clear()
        self._leases.clear()
        self._bytes = 0
