"""The owner's side of fetches: pieces being sent, and the memory that must outlive them.

An export may be dropped (by count, release or lease) while its bytes are on their way. The transfer keeps the memory
until UCX says the receiver is done with it. A receiver that never gets there is dead (UCX notices) or stopped: then,
some time after its deadline, when it can no longer use what it reads, the connection is cut and the memory let go.
"""

import asyncio
from collections.abc import Callable

from common.tensors.engine import Engine, Peer, PeerGone
from common.tensors.exports import Export
from common.tensors.memory import TensorBytes
from common.tensors.wire import FetchRequest, Kind, piece_count, piece_range, tag_of

_GRACE_S = 2.0


class _Transfer:
    """The pieces of one fetch. Holds the tensor's memory until ``pieces_left`` is 0."""

    def __init__(self, memory: TensorBytes, peer: Peer, pieces: int) -> None:
        self.memory = memory
        self.peer = peer
        self.pieces_left = pieces
        self.timer: asyncio.TimerHandle | None = None


class Outgoing:
    """Answers fetch requests."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._waiting: set[asyncio.Task[None]] = set()

    def answer(self, fetch_id: int, request: FetchRequest, export: Export | None) -> None:
        """Send the tensor, or that there is none."""
        try:
            peer = self._engine.peer(request.address, request.connection)
            if export is None:
                self._engine.send(peer, b"\0", tag_of(Kind.UNKNOWN, fetch_id), _ignore)
                # Frees what is held ready for it.
                self._engine.send(peer, b"\0", tag_of(Kind.PIECE, fetch_id), _ignore)
            elif export.ready is None or export.ready.query():  # type: ignore[no-untyped-call]
                self._send(fetch_id, request, export.memory, peer)
            else:
                self._send_when_ready(fetch_id, request, export, peer)
        except PeerGone:
            return  # whoever asked is no more

    def _send(self, fetch_id: int, request: FetchRequest, memory: TensorBytes, peer: Peer) -> None:
        pieces = piece_count(request.size_bytes, request.piece_bytes)
        transfer = _Transfer(memory, peer, pieces)
        done = self._piece_done(transfer)
        for piece in range(pieces):
            start, stop = piece_range(request.size_bytes, request.piece_bytes, piece)
            self._engine.send(peer, memory.range(start, stop), tag_of(Kind.PIECE, fetch_id, piece), done)
        if transfer.pieces_left:
            delay_s = max(0.0, request.remaining_s) + _GRACE_S
            transfer.timer = self._loop.call_later(delay_s, self._give_up, transfer)

    def _piece_done(self, transfer: _Transfer) -> Callable[[Exception | None], None]:
        def done(error: Exception | None) -> None:
            transfer.pieces_left -= 1
            if transfer.pieces_left == 0 and transfer.timer is not None:
                transfer.timer.cancel()

        return done

    def _give_up(self, transfer: _Transfer) -> None:
        if transfer.pieces_left:
            self._engine.break_off(transfer.peer)

    def _send_when_ready(self, fetch_id: int, request: FetchRequest, export: Export, peer: Peer) -> None:
        """Wait for the kernels that make the tensor, in a thread, so that the loop goes on."""

        async def wait_and_send() -> None:
            if export.ready is not None:
                await asyncio.to_thread(export.ready.synchronize)
            try:
                self._send(fetch_id, request, export.memory, peer)
            except PeerGone:
                return

        task = self._loop.create_task(wait_and_send())
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def close(self) -> None:
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)


def _ignore(error: Exception | None) -> None:
    """Nothing hangs on it."""
