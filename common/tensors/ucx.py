"""Tensors over UCX, through ucxx.

What one fetch costs: one request (an eager message of some 300 bytes) and the pieces, each announced by the owner and
read by the receiver's UCX straight out of the exporting tensor's memory into the destination. So one round trip before
the first byte, and one copy of the bytes, made by the kernel (CMA) or by the hardware. On one host the limit is
``memcpy``: a 128 MB tensor at 8 GB/s takes 16 ms, a round trip 0.02 ms. Of many small ones it is Python: handing UCX
a message takes each side some 4 microseconds, so they are fetched together, and the round trip is paid once.

How it stays sound when a process dies or stops: see ``docs/tensors.md``.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch

from common.messages.tensors import TensorRef
from common.tensors.engine import Arrival, Engine, PeerGone
from common.tensors.errors import (
    TensorMismatch,
    TensorsClosed,
    TensorsFull,
    TensorUnknown,
)
from common.tensors.exports import ExportTable
from common.tensors.fetching import Fetching
from common.tensors.incoming import copy_in_slices
from common.tensors.memory import TensorBytes, check_destination, check_reference, dtype_name
from common.tensors.outgoing import Outgoing
from common.tensors.receive_pool import ReceivePool
from common.tensors.wire import (
    MAXIMUM_CONTROL_BYTES,
    FetchRequest,
    Kind,
    pack_ids,
    read_tag,
    tag_of,
    unpack_ids,
)

DEFAULT_STRIPE_BYTES = 32 << 20
_CONTROL = frozenset((Kind.FETCH, Kind.UNKNOWN, Kind.TAKEN, Kind.RELEASE))
_DRAIN_S = 0.5
_RELEASE_S = 1.0


class UcxTensors:
    """The real ``Tensors``. Make one with ``await UcxTensors.open(...)``, after any fork."""

    def __init__(
        self,
        owner: str,
        *,
        device: torch.device | str = "cpu",
        stripe_bytes: int = DEFAULT_STRIPE_BYTES,
        max_exported_bytes: int | None = None,
        keep_receive_bytes: int = 512 << 20,
    ) -> None:
        """Use ``open``. This must be called with the event loop running."""
        if stripe_bytes < 4096:
            raise ValueError(f"stripe_bytes={stripe_bytes}: a piece of less than 4096 bytes is all overhead")
        self.owner = owner
        self._device = torch.device(device)
        self._max_exported_bytes = max_exported_bytes
        self._loop = asyncio.get_running_loop()
        # 62 random bits (positive in msgpack and in any language): an id of another life of this process is unknown.
        self._exports = ExportTable(first_id=secrets.randbits(62))
        self._pool = ReceivePool(keep_receive_bytes)
        self._lease_timer: asyncio.TimerHandle | None = None
        self._engine = Engine(self._arrived, lambda peer: self._fetching.peer_lost(peer))
        self._outgoing = Outgoing(self._engine, self._loop)
        self._fetching = Fetching(self._engine, self._loop, stripe_bytes, self._take)

    @classmethod
    async def open(
        cls,
        owner: str,
        *,
        device: torch.device | str = "cpu",
        stripe_bytes: int = DEFAULT_STRIPE_BYTES,
        max_exported_bytes: int | None = None,
        keep_receive_bytes: int = 512 << 20,
    ) -> Self:
        """Bring UCX up for this process and event loop.

        ``device`` is where fetched tensors go unless said otherwise. A tensor of more than ``stripe_bytes`` travels in
        pieces of that size. ``keep_receive_bytes`` bounds the idle receive buffers kept for reuse.

        Raises:
            ValueError: a ``stripe_bytes`` that makes no sense.
        """
        return cls(
            owner,
            device=device,
            stripe_bytes=stripe_bytes,
            max_exported_bytes=max_exported_bytes,
            keep_receive_bytes=keep_receive_bytes,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def address(self) -> bytes:
        """This process's UCX worker address."""
        return self._engine.address

    @property
    def exported_count(self) -> int:
        return len(self._exports)

    @property
    def exported_bytes(self) -> int:
        return self._exports.size_bytes

    @property
    def in_flight(self) -> int:
        """UCX requests not finished, pieces being sent or received among them."""
        return self._engine.in_flight

    # The owner's side

    def export(self, tensor: torch.Tensor, *, uses: int | None = 1, lease_s: float = 60.0) -> TensorRef:
        """See ``Tensors.export``."""
        return self.export_all((tensor,), uses=uses, lease_s=lease_s)[0]

    def export_all(
        self, tensors: Sequence[torch.Tensor], *, uses: int | None = 1, lease_s: float = 60.0
    ) -> list[TensorRef]:
        """See ``Tensors.export_all``."""
        self._check_open()
        if uses is not None and uses < 1:
            raise ValueError(f"uses={uses}: a tensor nobody may fetch; pass 1 or more, or None for no count")
        memories = [TensorBytes(tensor) for tensor in tensors]
        more, limit = sum(memory.size_bytes for memory in memories), self._max_exported_bytes
        if limit is not None and self._exports.size_bytes + more > limit:
            raise TensorsFull(
                f"{self.owner} keeps {self._exports.size_bytes} bytes for others; {more} more exceed "
                f"max_exported_bytes={limit}: release some, or raise the limit"
            )
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        lease_ends_s = self._loop.time() + lease_s
        refs = []
        for tensor, memory in zip(tensors, memories, strict=True):
            export = self._exports.add(memory, uses, lease_ends_s, ready.get(tensor.device))
            refs.append(
                TensorRef(
                    owner=self.owner,
                    tensor_id=export.tensor_id,
                    address=self._engine.address,
                    shape=tuple(tensor.shape),
                    dtype=dtype_name(tensor.dtype),
                    size_bytes=memory.size_bytes,
                )
            )
        self._watch_leases()
        return refs

    def renew(self, ref: TensorRef, lease_s: float) -> None:
        """See ``Tensors.renew``."""
        export = self._exports.find(ref.tensor_id, self._loop.time())
        if export is None:
            raise TensorUnknown(ref)
        self._exports.renew(export, self._loop.time() + lease_s)
        self._watch_leases()

    async def release(self, ref: TensorRef) -> None:
        """See ``Tensors.release``. An owner that is gone keeps nothing, so that is no error."""
        self._check_open()
        if ref.address == self._engine.address:
            self._exports.drop(ref.tensor_id)
            return
        sent: asyncio.Future[None] = self._loop.create_future()
        try:
            peer = self._engine.peer(ref.address)
            self._engine.send(peer, pack_ids([ref.tensor_id]), tag_of(Kind.RELEASE), lambda _: _resolve(sent))
            async with asyncio.timeout(_RELEASE_S):
                await sent
        except (PeerGone, TimeoutError):
            return

    def _watch_leases(self) -> None:
        """Come again when the next lease ends. Who comes before that changes nothing, and costs less than a new timer
        for every export."""
        next_s = self._exports.expire(self._loop.time())
        if next_s is None or (self._lease_timer is not None and self._lease_timer.when() <= next_s):
            return
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        self._lease_timer = self._loop.call_at(next_s, self._lease_ends)

    def _lease_ends(self) -> None:
        self._lease_timer = None
        self._watch_leases()

    # The receiver's side

    async def fetch(
        self,
        ref: TensorRef,
        into: torch.Tensor | None = None,
        *,
        deadline_s: float = 10.0,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """See ``Tensors.fetch``."""
        self._check_open()
        deadline = self._loop.time() + deadline_s
        memory = self._memory(ref, into, self._device if device is None else torch.device(device))
        [here] = await self._fetched((ref,), (memory,), deadline, settle=into is not None)
        return here.tensor if into is None else into

    async def fetch_all(
        self,
        refs: Sequence[TensorRef],
        into: Sequence[torch.Tensor | None],
        *,
        deadline_s: float = 10.0,
        device: torch.device | str | None = None,
    ) -> list[torch.Tensor]:
        """See ``Tensors.fetch_all``."""
        self._check_open()
        deadline = self._loop.time() + deadline_s
        if len(into) != len(refs) or any(ref.address != refs[0].address for ref in refs[1:]):
            raise TensorMismatch(
                f"{len(refs)} tensors into {len(into)} places: pass one for each, and those of one owner"
            )
        if not refs:
            return []
        target = self._device if device is None else torch.device(device)
        memories = [self._memory(ref, place, target) for ref, place in zip(refs, into, strict=True)]
        here = await self._fetched(refs, memories, deadline, settle=any(place is not None for place in into))
        return [memory.tensor if place is None else place for memory, place in zip(here, into, strict=True)]

    def _memory(self, ref: TensorRef, into: torch.Tensor | None, device: torch.device) -> TensorBytes | None:
        """Where it is to go; None: memory of ours on the CPU, to be taken while the request is on its way."""
        dtype = check_reference(ref)
        if into is not None:
            check_destination(ref, dtype, into)
            return TensorBytes(into, "into")
        if device.type != "cpu":
            return TensorBytes(torch.empty(ref.shape, dtype=dtype, device=device))
        return None

    def _take(self, ref: TensorRef) -> TensorBytes:
        return self._pool.take(ref.shape, check_reference(ref))

    def _fetched(
        self, refs: Sequence[TensorRef], memories: Sequence[TensorBytes | None], deadline: float, *, settle: bool
    ) -> Awaitable[Sequence[TensorBytes]]:
        if refs[0].address == self._engine.address:
            return self._fetch_own(refs, memories)
        return self._fetching.fetch(refs, memories, deadline, settle=settle)

    async def _fetch_own(self, refs: Sequence[TensorRef], memories: Sequence[TensorBytes | None]) -> list[TensorBytes]:
        here = []
        for ref, memory in zip(refs, memories, strict=True):
            export = self._exports.find(ref.tensor_id, self._loop.time())
            if export is None:
                raise TensorUnknown(ref)
            place = self._take(ref) if memory is None else memory
            await copy_in_slices(place.tensor, export.memory.tensor)
            here.append(place)
        self._count(ref.tensor_id for ref in refs)
        return here

    # What comes in

    def _arrived(self, arrival: Arrival) -> None:
        kind, fetch_id, piece = read_tag(arrival.tag)
        if kind == Kind.PIECE:
            self._fetching.piece_arrived(arrival, fetch_id, piece)
        elif kind in _CONTROL and arrival.size_bytes <= MAXIMUM_CONTROL_BYTES:
            data = bytearray(arrival.size_bytes)
            self._engine.receive(arrival, data, partial(self._heard, kind, fetch_id, piece, data))
        else:
            self._engine.drop(arrival)

    def _heard(self, kind: int, fetch_id: int, piece: int, data: bytearray, error: Exception | None) -> None:
        if error is not None:
            return
        try:
            if kind == Kind.FETCH:
                request = FetchRequest.unpack(data)
                self._count(request.taken)  # first: the tensor asked for may be one whose last use that was
                self._serve(fetch_id, request)
            elif kind == Kind.UNKNOWN:
                self._fetching.is_unknown(fetch_id, piece)
            elif kind == Kind.TAKEN:
                self._count(unpack_ids(data))
            elif kind == Kind.RELEASE:
                for tensor_id in unpack_ids(data):
                    self._exports.drop(tensor_id)
        except ValueError:
            return  # not of our making, or of another version: its sender's deadline tells it

    def _serve(self, fetch_id: int, request: FetchRequest) -> None:
        now_s = self._loop.time()
        exports = []
        for number, tensor_id in enumerate(request.tensor_ids):
            export = self._exports.find(tensor_id, now_s)
            if export is None or export.memory.size_bytes != request.sizes_bytes[number]:
                self._outgoing.refuse(fetch_id, request, number)
                return
            exports.append(export)
        self._outgoing.answer(fetch_id, request, exports)

    def _count(self, tensor_ids: Iterable[int]) -> None:
        for tensor_id in tensor_ids:
            self._exports.taken(tensor_id)

    # End

    def _check_open(self) -> None:
        if self._engine.closed:
            raise TensorsClosed(f"the tensors of {self.owner} are closed")

    async def close(self) -> None:
        """See ``Tensors.close``."""
        if self._engine.closed:
            return
        self._fetching.close(TensorsClosed(f"the tensors of {self.owner} were closed"))
        self._exports.clear()
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        await self._outgoing.close()
        await self._engine.close(self._loop.time() + _DRAIN_S)
        self._pool.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
