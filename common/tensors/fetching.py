"""The receiver's side: asks owners for tensors, has the pieces put in place, and says what has been taken."""

import asyncio
import secrets
from collections.abc import Callable, Sequence

import torch

from common.messages.tensors import TensorRef
from common.tensors.engine import Arrival, Engine, Peer, PeerGone
from common.tensors.errors import TensorOwnerLost, TensorUnknown
from common.tensors.incoming import Fetch
from common.tensors.memory import TensorBytes
from common.tensors.wire import MAXIMUM_TENSORS, FetchRequest, Kind, pack_ids, tag_of

_SETTLE_S = 0.2
_MAXIMUM_NOTED = 64

Take = Callable[[TensorRef], TensorBytes]


class Fetching:
    """Fetches of one process. ``take`` gives memory for a tensor that was given none."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, stripe_bytes: int, take: Take) -> None:
        self._engine = engine
        self._loop = loop
        self._stripe_bytes = stripe_bytes
        self._take = take
        self._fetches: dict[int, Fetch] = {}
        self._next_fetch = secrets.randbits(39)
        self._taken: dict[Peer, list[int]] = {}
        self._taken_timer: asyncio.Handle | None = None

    async def fetch(
        self, refs: Sequence[TensorRef], memories: Sequence[TensorBytes | None], deadline: float, *, settle: bool
    ) -> Sequence[TensorBytes]:
        """Tensors of one owner, any number, by ``deadline`` (the loop's time). Counted when all of them are here.

        ``settle``: to hold the memories, after an error too, until UCX has let go of them.

        Raises: see ``Tensors.fetch_all``.
        """
        if len(refs) <= MAXIMUM_TENSORS:
            here = [await self._fetch(refs, memories, deadline, settle)]
        else:
            groups = [slice(first, first + MAXIMUM_TENSORS) for first in range(0, len(refs), MAXIMUM_TENSORS)]
            here = [await self._fetch(refs[group], memories[group], deadline, settle) for group in groups]
        for fetch in here:
            self._note_taken(fetch)
        if self._engine.starving():
            await asyncio.sleep(0)
        return here[0].memories if len(here) == 1 else [memory for fetch in here for memory in fetch.memories]

    async def _fetch(
        self, refs: Sequence[TensorRef], memories: Sequence[TensorBytes | None], deadline: float, settle: bool
    ) -> Fetch:
        from_before = self._engine.knows(refs[0].address)
        fetch = Fetch(refs, memories, self._stripe_bytes, deadline, self._loop)
        try:
            await self._run(fetch, settle)
            return fetch
        except TensorOwnerLost:
            # An endpoint from before may have died unnoticed, with its owner alive: it cut off a reader that stood
            # still. As long as nothing has come, a fresh one can be tried.
            if not from_before or not fetch.nothing_came() or self._loop.time() >= deadline:
                raise
        fetch = Fetch(refs, memories, self._stripe_bytes, deadline, self._loop)
        await self._run(fetch, settle)
        return fetch

    async def _run(self, fetch: Fetch, settle: bool) -> None:
        fetch_id = self._next_fetch = (self._next_fetch + 1) % (1 << 40)
        for device in {one.tensor.device for one in fetch.given if one is not None and one.tensor.is_cuda}:
            # Kernels that still use the destination must be done before another process writes to it.
            await asyncio.to_thread(torch.cuda.current_stream(device).synchronize)
        self._fetches[fetch_id] = fetch
        try:
            self._ask(fetch_id, fetch)
            if len(self._fetches) == 1:
                self._engine.look(fetch.done.done)
            await fetch.wait()
        except PeerGone as error:
            raise TensorOwnerLost(fetch.awaited, f"its owner is gone ({error})") from error
        finally:
            fetch.stop()
            self._fetches.pop(fetch_id, None)
            if settle and fetch.receiving:
                await self._settle(fetch)

    def _ask(self, fetch_id: int, fetch: Fetch) -> None:
        peer = fetch.peer = self._engine.peer(fetch.refs[0].address)
        request = FetchRequest(
            tuple([ref.tensor_id for ref in fetch.refs]),
            fetch.sizes_bytes,
            fetch.piece_bytes,
            fetch.deadline - self._loop.time(),
            peer.connection,
            self._engine.address,
            tuple(self._taken.pop(peer, ())),
        )
        self._engine.send(peer, request.pack(), tag_of(Kind.FETCH, fetch_id), fetch.requested)
        # While the request is on its way. Nothing arrives before UCX is advanced again.
        memories = [self._take(ref) if one is None else one for ref, one in zip(fetch.refs, fetch.given, strict=True)]
        fetch.memories = memories
        if fetch.in_one_piece and fetch.given[0] is None:
            done = fetch.expect_whole(self._engine.hand_on)
            self._engine.expect(peer, memories[0].range(0, fetch.sizes_bytes[0]), tag_of(Kind.PIECE, fetch_id), done)

    async def _settle(self, fetch: Fetch) -> None:
        """Hold the caller's memory until UCX has let go of it: wait a little, then cut the connection."""
        if not await fetch.wait_idle(_SETTLE_S) and fetch.peer is not None:
            self._engine.break_off(fetch.peer)
            await fetch.wait_idle(_SETTLE_S)

    # What comes in

    def piece_arrived(self, arrival: Arrival, fetch_id: int, piece: int) -> None:
        """Have it put in its place, or drop it where nobody waits for it."""
        fetch = self._fetches.get(fetch_id)
        buffer = None if fetch is None else fetch.place(piece, arrival.size_bytes)
        if fetch is None or buffer is None:
            self._engine.drop(arrival)
            return
        self._engine.receive(arrival, buffer, fetch.begin_piece(piece))

    def is_unknown(self, fetch_id: int, tensor: int) -> None:
        """The owner has not the tensor of this number among those of that fetch."""
        fetch = self._fetches.get(fetch_id)
        if fetch is not None and tensor < len(fetch.refs):
            fetch.fail(TensorUnknown(fetch.refs[tensor]))

    def peer_lost(self, peer: Peer) -> None:
        """Nothing comes from there any more."""
        for fetch in list(self._fetches.values()):
            if fetch.peer is peer:
                fetch.fail(TensorOwnerLost(fetch.awaited, "its owner is gone"))

    # What has been taken

    def _note_taken(self, fetch: Fetch) -> None:
        """Have it said with the next fetch from that owner, or in the loop's next turn, whichever is first."""
        peer = fetch.peer
        assert peer is not None
        noted = self._taken.setdefault(peer, [])
        noted.extend([ref.tensor_id for ref in fetch.refs])
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

    def close(self, error: Exception) -> None:
        """End every fetch with ``error``; what was taken is said."""
        for fetch in list(self._fetches.values()):
            fetch.fail(error)
        self._say_all_taken()
        if self._taken_timer is not None:
            self._taken_timer.cancel()
