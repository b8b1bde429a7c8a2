"""Tensors over UCX, through ucxx.

What one fetch costs: one request (an eager message of some 300 bytes) and the pieces, each announced by the owner and
read by the receiver's UCX straight out of the exporting tensor's memory into the destination. So one round trip before
the first byte, and one copy of the bytes, made by the kernel (CMA) or by the hardware. On one host the limit is
``memcpy``: a 128 MB tensor at 8 GB/s takes 16 ms, a round trip 0.02 ms.

How it stays sound when a process dies or stops: see ``docs/tensors.md``.
"""

import asyncio
import secrets
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch

from common.messages.tensors import TensorRef
from common.tensors.engine import Arrival, Engine, Peer, PeerGone
from common.tensors.errors import (
    TensorOwnerLost,
    TensorsClosed,
    TensorsFull,
    TensorUnknown,
)
from common.tensors.exports import ExportTable
from common.tensors.incoming import Fetch, copy_in_slices
from common.tensors.memory import TensorBytes, check_destination, check_reference, dtype_name
from common.tensors.outgoing import Outgoing
from common.tensors.receive_pool import ReceivePool
from common.tensors.wire import (
    MAXIMUM_CONTROL_BYTES,
    MAXIMUM_PIECES,
    FetchRequest,
    Kind,
    pack_ids,
    read_tag,
    tag_of,
    unpack_ids,
)

DEFAULT_STRIPE_BYTES = 32 << 20
_CONTROL = frozenset((Kind.FETCH, Kind.UNKNOWN, Kind.TAKEN, Kind.RELEASE))
_SETTLE_S = 0.2
_DRAIN_S = 0.5
_RELEASE_S = 1.0
_MAXIMUM_NOTED = 64


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
        self._stripe_bytes = stripe_bytes
        self._max_exported_bytes = max_exported_bytes
        self._loop = asyncio.get_running_loop()
        # 62 random bits (positive in msgpack and in any language): an id of another life of this process is unknown.
        self._exports = ExportTable(first_id=secrets.randbits(62))
        self._pool = ReceivePool(keep_receive_bytes)
        self._fetches: dict[int, Fetch] = {}
        self._next_fetch = secrets.randbits(39)
        self._taken: dict[Peer, list[int]] = {}
        self._taken_timer: asyncio.Handle | None = None
        self._lease_timer: asyncio.TimerHandle | None = None
        self._engine = Engine(self._arrived, self._peer_lost)
        self._outgoing = Outgoing(self._engine, self._loop)

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
        self._check_open()
        if uses is not None and uses < 1:
            raise ValueError(f"uses={uses}: a tensor nobody may fetch; pass 1 or more, or None for no count")
        memory = TensorBytes(tensor)
        limit = self._max_exported_bytes
        if limit is not None and self._exports.size_bytes + memory.size_bytes > limit:
            raise TensorsFull(
                f"{self.owner} keeps {self._exports.size_bytes} bytes for others; {memory.size_bytes} more exceed "
                f"max_exported_bytes={limit}: release some, or raise the limit"
            )
        export = self._exports.add(memory, uses, self._loop.time() + lease_s)
        if tensor.device.type == "cuda":
            export.ready = torch.cuda.current_stream(tensor.device).record_event()
        self._watch_leases()
        return TensorRef(
            owner=self.owner,
            tensor_id=export.tensor_id,
            address=self._engine.address,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            size_bytes=memory.size_bytes,
        )

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
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        next_s = self._exports.expire(self._loop.time())
        self._lease_timer = None if next_s is None else self._loop.call_at(next_s, self._watch_leases)

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
        dtype = check_reference(ref)
        target = self._device if device is None else torch.device(device)
        memory: TensorBytes | None = None
        if into is not None:
            check_destination(ref, dtype, into)
            memory = TensorBytes(into, "into")
        elif target.type != "cpu" or ref.address == self._engine.address:
            memory = self._allocate(ref, dtype, target)
        if ref.address == self._engine.address and memory is not None:
            await self._fetch_own(ref, memory)
        else:
            memory = await self._fetch_from_peer(ref, memory, dtype, deadline, settle=into is not None)
        return memory.tensor if into is None else into

    def _allocate(self, ref: TensorRef, dtype: torch.dtype, device: torch.device) -> TensorBytes:
        if device.type == "cpu":
            return self._pool.take(ref.shape, dtype)
        return TensorBytes(torch.empty(ref.shape, dtype=dtype, device=device))

    async def _fetch_own(self, ref: TensorRef, memory: TensorBytes) -> None:
        export = self._exports.find(ref.tensor_id, self._loop.time())
        if export is None:
            raise TensorUnknown(ref)
        await copy_in_slices(memory.tensor, export.memory.tensor)
        self._exports.taken(ref.tensor_id)

    async def _fetch_from_peer(
        self, ref: TensorRef, memory: TensorBytes | None, dtype: torch.dtype, deadline: float, *, settle: bool
    ) -> TensorBytes:
        piece_bytes = max(self._stripe_bytes, -(-ref.size_bytes // MAXIMUM_PIECES))
        from_before = self._engine.knows(ref.address)
        fetch = Fetch(ref, memory, piece_bytes, deadline, self._loop)
        try:
            return await self._fetch_once(fetch, dtype, settle=settle)
        except TensorOwnerLost:
            # An endpoint from before may have died unnoticed, with its owner alive: it cut off a reader that stood
            # still. As long as nothing has come, a fresh one can be tried.
            if not from_before or not fetch.nothing_came() or self._loop.time() >= deadline:
                raise
        return await self._fetch_once(Fetch(ref, memory, piece_bytes, deadline, self._loop), dtype, settle=settle)

    async def _fetch_once(self, fetch: Fetch, dtype: torch.dtype, *, settle: bool) -> TensorBytes:
        fetch_id = self._next_fetch = (self._next_fetch + 1) % (1 << 40)
        ref, memory = fetch.ref, fetch.memory
        if memory is not None and memory.tensor.device.type == "cuda":
            # Kernels that still use the destination must be done before another process writes to it.
            await asyncio.to_thread(torch.cuda.current_stream(memory.tensor.device).synchronize)
        try:
            peer = self._engine.peer(ref.address)
            fetch.peer = peer
            request = FetchRequest(
                ref.tensor_id,
                ref.size_bytes,
                fetch.piece_bytes,
                fetch.deadline - self._loop.time(),
                peer.connection,
                self._engine.address,
                tuple(self._taken.pop(peer, ())),
            )
            self._fetches[fetch_id] = fetch
            self._engine.send(peer, request.pack(), tag_of(Kind.FETCH, fetch_id), fetch.requested)
            if memory is None:
                # While the request is on its way. Nothing arrives before UCX is advanced again.
                memory = fetch.memory = self._pool.take(ref.shape, dtype)
                if ref.size_bytes <= fetch.piece_bytes:
                    done = fetch.expect_whole(self._engine.hand_on)
                    self._engine.expect(peer, memory.range(0, ref.size_bytes), tag_of(Kind.PIECE, fetch_id), done)
            if len(self._fetches) == 1:
                self._engine.look(fetch.done.done)
            await fetch.wait()
        except PeerGone as error:
            raise TensorOwnerLost(ref, f"its owner is gone ({error})") from error
        finally:
            fetch.stop()
            self._fetches.pop(fetch_id, None)
            if settle and fetch.receiving:
                await self._settle(fetch)
        self._note_taken(peer, ref.tensor_id)
        if self._engine.starving():
            await asyncio.sleep(0)
        return memory

    def _note_taken(self, peer: Peer, tensor_id: int) -> None:
        """Have it said with the next fetch from that owner, or in the loop's next turn, whichever is first."""
        noted = self._taken.setdefault(peer, [])
        noted.append(tensor_id)
        if len(noted) >= _MAXIMUM_NOTED:
            self._say_taken(peer)
        elif self._taken_timer is None:
            self._taken_timer = self._loop.call_soon(self._say_all_taken)

    def _say_all_taken(self) -> None:
        self._taken_timer = None
        for peer in list(self._taken):
            self._say_taken(peer)

    def _say_taken(self, peer: Peer) -> None:
        tensor_ids = self._taken.pop(peer)
        try:
            self._engine.send(peer, pack_ids(tensor_ids), tag_of(Kind.TAKEN), lambda _: None)
        except PeerGone:
            return  # the owner died after its bytes had arrived: nothing is left to be counted

    async def _settle(self, fetch: Fetch) -> None:
        """Hold the caller's memory until UCX has let go of it: wait a little, then cut the connection."""
        if not await fetch.wait_idle(_SETTLE_S) and fetch.peer is not None:
            self._engine.break_off(fetch.peer)
            await fetch.wait_idle(_SETTLE_S)

    # What comes in

    def _arrived(self, arrival: Arrival) -> None:
        kind, fetch_id, piece = read_tag(arrival.tag)
        if kind == Kind.PIECE:
            self._piece_arrived(arrival, fetch_id, piece)
        elif kind in _CONTROL and arrival.size_bytes <= MAXIMUM_CONTROL_BYTES:
            data = bytearray(arrival.size_bytes)
            self._engine.receive(arrival, data, lambda error: None if error else self._control(kind, fetch_id, data))
        else:
            self._engine.drop(arrival)

    def _piece_arrived(self, arrival: Arrival, fetch_id: int, piece: int) -> None:
        fetch = self._fetches.get(fetch_id)
        buffer = None if fetch is None else fetch.place(piece, arrival.size_bytes)
        if fetch is None or buffer is None:
            self._engine.drop(arrival)
            return
        self._engine.receive(arrival, buffer, fetch.begin_piece(piece))

    def _control(self, kind: int, fetch_id: int, data: bytearray) -> None:
        try:
            if kind == Kind.FETCH:
                request = FetchRequest.unpack(data)
                self._count(request.taken)  # first: the tensor asked for may be one whose last use that was
                self._serve(fetch_id, request)
            elif kind == Kind.UNKNOWN and (fetch := self._fetches.get(fetch_id)) is not None:
                fetch.fail(TensorUnknown(fetch.ref))
            elif kind == Kind.TAKEN:
                self._count(unpack_ids(data))
            elif kind == Kind.RELEASE:
                for tensor_id in unpack_ids(data):
                    self._exports.drop(tensor_id)
        except ValueError:
            return  # not of our making, or of another version: its sender's deadline tells it

    def _serve(self, fetch_id: int, request: FetchRequest) -> None:
        export = self._exports.find(request.tensor_id, self._loop.time())
        if export is not None and export.memory.size_bytes != request.size_bytes:
            export = None
        self._outgoing.answer(fetch_id, request, export)

    def _count(self, tensor_ids: Iterable[int]) -> None:
        for tensor_id in tensor_ids:
            self._exports.taken(tensor_id)

    def _peer_lost(self, peer: Peer) -> None:
        for fetch in list(self._fetches.values()):
            if fetch.peer is peer:
                fetch.fail(TensorOwnerLost(fetch.ref, "its owner is gone"))

    # End

    def _check_open(self) -> None:
        if self._engine.closed:
            raise TensorsClosed(f"the tensors of {self.owner} are closed")

    async def close(self) -> None:
        """See ``Tensors.close``."""
        if self._engine.closed:
            return
        for fetch in list(self._fetches.values()):
            fetch.fail(TensorsClosed(f"the tensors of {self.owner} were closed"))
        self._say_all_taken()
        self._exports.clear()
        for timer in (self._lease_timer, self._taken_timer):
            if timer is not None:
                timer.cancel()
        await self._outgoing.close()
        await self._engine.close(self._loop.time() + _DRAIN_S)
        self._pool.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
