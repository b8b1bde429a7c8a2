"""The owner's side of fetches: pieces being sent, and the memory that must outlive them.

An export may be dropped (by count, release or lease) while its bytes are on their way. What is posted keeps its memory
until UCX says the receiver is done with it. A receiver that never gets there is dead (UCX notices) or stopped: then,
some time after its deadline, when it can no longer use what it reads, the connection is cut and the memory let go.
"""

import asyncio
from collections.abc import Sequence

from common.tensors.engine import Engine, Peer, PeerGone
from common.tensors.exports import Export
from common.tensors.wire import FetchRequest, Kind, pieces_of, tag_of

_GRACE_S = 2.0


class _Transfer:
    """What is sent in answer to one request."""

    def __init__(self) -> None:
        self.ended = False
        self.timer: asyncio.TimerHandle | None = None

    def end(self, error: Exception | None) -> None:
        """All of it has left, or could not."""
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()


class Outgoing:
    """Answers fetch requests."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._waiting: set[asyncio.Task[None]] = set()

    def answer(self, fetch_id: int, request: FetchRequest, exports: Sequence[Export]) -> None:
        """Send the tensors that were asked for."""
        try:
            peer = self._engine.peer(request.address, request.connection)
            if all(map(_is_ready, exports)):
                self._send(fetch_id, request, exports, peer)
            else:
                self._send_when_ready(fetch_id, request, exports, peer)
        except PeerGone:
            return  # whoever asked is no more

    def refuse(self, fetch_id: int, request: FetchRequest, unknown: int) -> None:
        """Say that there is not the tensor of this number among those that were asked for; none is sent."""
        try:
            peer = self._engine.peer(request.address, request.connection)
            self._engine.send(peer, b"\0", tag_of(Kind.UNKNOWN, fetch_id, unknown), _ignore)
            # Frees what is held ready for it.
            self._engine.send(peer, b"\0", tag_of(Kind.PIECE, fetch_id), _ignore)
        except PeerGone:
            return

    def _send(self, fetch_id: int, request: FetchRequest, exports: Sequence[Export], peer: Peer) -> None:
        pieces = pieces_of(request.sizes_bytes, request.piece_bytes)
        memories = [export.memory for export in exports]
        tag = tag_of(Kind.PIECE, fetch_id)
        transfer = _Transfer()
        messages = [
            (memories[one].range(start, stop), tag | number) for number, (one, start, stop) in enumerate(pieces)
        ]
        self._engine.send_all(peer, messages, transfer.end)
        if not transfer.ended:
            delay_s = max(0.0, request.remaining_s) + _GRACE_S
            transfer.timer = self._loop.call_later(delay_s, self._engine.break_off, peer)

    def _send_when_ready(self, fetch_id: int, request: FetchRequest, exports: Sequence[Export], peer: Peer) -> None:
        """Wait for the kernels that make the tensors, in a thread, so that the loop goes on."""

        async def wait_and_send() -> None:
            await asyncio.to_thread(_wait_for, exports)
            try:
                self._send(fetch_id, request, exports, peer)
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


def _is_ready(export: Export) -> bool:
    return export.ready is None or bool(export.ready.query())  # type: ignore[no-untyped-call]


def _wait_for(exports: Sequence[Export]) -> None:
    for export in exports:
        if export.ready is not None:
            export.ready.synchronize()
