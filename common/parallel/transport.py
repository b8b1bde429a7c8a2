"""The processes' connections to each other: Gloo over TCP, or NCCL between GPUs, built for one member set alone.

`torch.distributed` is used below its global state: there is no `init_process_group` and no world, so a dead process
takes nobody with it but the groups it was in.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions, Store, Work

BackendName = Literal["gloo", "nccl"]


class Transport(Protocol):
    """What torch's backends offer, as far as it is used here; the stubs of torch leave it out."""

    def alltoall_base(
        self, output: Tensor, sent: Tensor, output_sizes: list[int], sent_sizes: list[int], options: AllToAllOptions, /
    ) -> Work: ...

    def _allgather_base(self, output: Tensor, sent: Tensor, options: AllgatherOptions, /) -> Work: ...

    def broadcast(self, tensors: Sequence[Tensor], options: BroadcastOptions, /) -> Work: ...


class Connector(Protocol):
    """Builds transports on one device. Two of them for one group must not share a prefix of the store."""

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be sent."""

    def connect(self, store: Store, rank: int, size: int, timeout_s: float) -> Transport:
        """Meet the others at the store. Raises RuntimeError if one does not come within the time."""

    def failure(self, transport: Transport) -> str | None:
        """Wait for what was started; what went wrong, if anything did."""


class GlooConnector:
    """Gloo over TCP. Tensors are sent from main memory; every exchange has happened when its call returns."""

    def __init__(self, host: str) -> None:
        """host: the address at which the others reach this process."""
        # Imported here: a torch without Gloo lacks the name.
        from torch._C._distributed_c10d import ProcessGroupGloo

        self.device = torch.device("cpu")
        self._kind: Any = ProcessGroupGloo
        # One listener and one loop thread for all groups of the process: a group then costs one thread, and one
        # file descriptor for each other member.
        self._gloo_device = ProcessGroupGloo.create_device(hostname=host)

    def connect(self, store: Store, rank: int, size: int, timeout_s: float) -> Transport:
        options = self._kind._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [self._gloo_device]
        options._threads = 1
        transport: Transport = self._kind(store, rank, size, options)
        return transport

    def failure(self, transport: Transport) -> str | None:
        return None


class NcclConnector:
    """NCCL, between processes with one GPU each. Exchanges are queued on the current stream, so errors come late."""

    def __init__(self, device: torch.device) -> None:
        # On a time-out the communicator is aborted, and the process lives on: without this it would be torn down.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        from torch._C._distributed_c10d import ErrorType, ProcessGroupNCCL

        self.device = device
        self._kind: Any = ProcessGroupNCCL
        self._success = ErrorType.SUCCESS

    def connect(self, store: Store, rank: int, size: int, timeout_s: float) -> Transport:
        options = self._kind.Options()
        options._timeout = timedelta(seconds=timeout_s)
        with torch.cuda.device(self.device):
            transport: Transport = self._kind(store, rank, size, options)
        return transport

    def failure(self, transport: Transport) -> str | None:
        torch.cuda.current_stream(self.device).synchronize()
        state = transport.get_error()  # type: ignore[attr-defined]
        return None if state == self._success else f"NCCL says {state}"


def connector(backend: BackendName, host: str, device: torch.device) -> Connector:
    """The connector of that name, for tensors on `device` and a process that others reach at `host`."""
    return GlooConnector(host) if backend == "gloo" else NcclConnector(device)
