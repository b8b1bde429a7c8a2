"""A group of processes that compute one thing together, and the exchanges they do it with.

All members make the same calls in the same order. Nothing below checks that: a member whose message has another
length than the receiver expects ends the receiver's process (Gloo aborts). So a group is left only where all members
leave it, and whoever must leave elsewhere closes it: the others then get `GroupBroken`.
"""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions, Work

from common.parallel.errors import GroupBroken
from common.parallel.transport import Connector, Transport


class Group:
    """Ordered members; `rank` is this process's place among them. Used by one thread at a time."""

    def __init__(
        self, members: tuple[str, ...], rank: int, transport: Transport | None, connector: Connector, timeout_s: float
    ) -> None:
        """transport: None for a group of one, which needs none. timeout_s: of every exchange."""
        self.members = members
        self.rank = rank
        self.size = len(members)
        self.closed = False
        self._transport = transport
        self._connector = connector
        self._timeout = timedelta(seconds=timeout_s)

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send piece i to rank i; returns what each rank sent here, by rank, in `shapes`.

        Pieces have one dtype and device, and any shapes and strides, empty ones included. With NCCL this only
        queues the exchange. Raises GroupBroken.
        """
        if self.size == 1:
            self._check_open()
            return [pieces[0].reshape(tuple(shapes[0]))]
        dtype, device = pieces[0].dtype, pieces[0].device
        counts = [math.prod(shape) for shape in shapes]
        sent = _bytes(_joined(pieces), self._connector.device)
        received = torch.empty(sum(counts) * dtype.itemsize, dtype=torch.uint8, device=sent.device)
        options = AllToAllOptions()
        options.timeout = self._timeout
        sent_sizes = [piece.numel() * dtype.itemsize for piece in pieces]
        received_sizes = [count * dtype.itemsize for count in counts]
        self._run(
            lambda transport: transport.alltoall_base(received, sent, received_sizes, sent_sizes, options),
            settle=device != sent.device,
        )
        parts = torch.split(received.view(dtype).to(device), counts)
        return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]

    def all_gather(self, piece: Tensor) -> list[Tensor]:
        """Every rank's piece, by rank. All have one shape and dtype. Raises GroupBroken."""
        if self.size == 1:
            self._check_open()
            return [piece]
        sent = _bytes(piece.reshape(-1), self._connector.device)
        received = torch.empty(self.size * sent.numel(), dtype=torch.uint8, device=sent.device)
        options = AllgatherOptions()
        options.timeout = self._timeout
        self._run(lambda transport: transport._allgather_base(received, sent, options), settle=True)
        return list(received.view(piece.dtype).to(piece.device).view(self.size, *piece.shape).unbind(0))

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Rank `root`'s tensor, on every rank; the others pass one of the same shape and dtype. Raises GroupBroken."""
        if self.size == 1:
            self._check_open()
            return tensor
        sent = _bytes(tensor.reshape(-1), self._connector.device)
        if self.rank != root:
            sent = torch.empty_like(sent)
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, self._timeout
        self._run(lambda transport: transport.broadcast([sent], options), settle=True)
        return sent.view(tensor.dtype).to(tensor.device).view(tensor.shape)

    def agree(self, value: int, root: int = 0) -> int:
        """The value of rank `root`, on every rank: how a leader tells the others what comes next."""
        return int(self.broadcast(torch.tensor(value, dtype=torch.int64), root))

    def compare(self, value: int, timeout_s: float | None = None) -> list[int]:
        """Every rank's value, by rank. Each speaks with each, so one closed connection anywhere is noticed."""
        if self.size == 1:
            self._check_open()
            return [value]
        sent = torch.full((self.size,), value, dtype=torch.int64, device=self._connector.device)
        received = torch.empty_like(sent)
        options = AllToAllOptions()
        options.timeout = self._timeout if timeout_s is None else timedelta(seconds=timeout_s)
        self._run(lambda transport: transport.alltoall_base(received, sent, [], [], options), settle=True)
        return [int(theirs) for theirs in received.tolist()]

    def close(self) -> None:
        """Close this member's connections: whoever exchanges with it then gets GroupBroken at once."""
        self.closed = True
        self._transport = None

    def _check_open(self) -> None:
        if self.closed:
            raise GroupBroken(self.members, "it was closed")

    def _run(self, start: Callable[[Transport], Work], settle: bool = False) -> None:
        """Do one exchange; settle: wait until it has happened, also where it is only queued otherwise."""
        self._check_open()
        reason = self._attempt(start, settle)
        if reason is not None:
            # Closing is what tells members that do not exchange with the dead one. It takes dropping every
            # reference to the transport, so the error is not raised from one whose traceback still holds it.
            self.close()
            raise GroupBroken(self.members, reason)

    def _attempt(self, start: Callable[[Transport], Work], settle: bool) -> str | None:
        transport = self._transport
        if transport is None:
            return "it has no connections"
        try:
            start(transport).wait()
            return self._connector.failure(transport) if settle else None
        except RuntimeError as error:
            return str(error).partition("\n")[0]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """All pieces in one flat tensor, copied once whatever their strides."""
    counts = [piece.numel() for piece in pieces]
    joined = pieces[0].new_empty(sum(counts))
    for part, piece in zip(torch.split(joined, counts), pieces, strict=True):
        part.view(piece.shape).copy_(piece)
    return joined


def _bytes(flat: Tensor, device: torch.device) -> Tensor:
    """A flat tensor as bytes on the device it is sent from: every dtype travels the same way."""
    return flat.detach().contiguous().to(device).view(torch.uint8)
