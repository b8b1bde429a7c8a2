"""One fetch under way, of one tensor or several: which pieces are here or being received, and how it ends."""

import asyncio
from collections.abc import Callable, Sequence

import torch

from common.messages.tensors import TensorRef
from common.tensors.engine import Peer
from common.tensors.errors import TensorFetchTimeout, TensorOwnerLost
from common.tensors.memory import ByteRange, TensorBytes
from common.tensors.wire import piece_size, pieces_of

_SLICE_BYTES = 1 << 20


class Fetch:
    """``done`` ends with None, or with the error the fetcher is to see. Memory is held until ``receiving`` is 0."""

    def __init__(
        self,
        refs: Sequence[TensorRef],
        given: Sequence[TensorBytes | None],
        stripe_bytes: int,
        deadline: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """``deadline`` is in the loop's time. ``memories`` are set later, before the first piece can arrive."""
        self.refs = refs
        self.sizes_bytes = tuple([ref.size_bytes for ref in refs])
        self.given = given
        self.memories: Sequence[TensorBytes] = ()
        self.piece_bytes = piece_size(self.sizes_bytes, stripe_bytes)
        self.deadline = deadline
        self.peer: Peer | None = None
        self.receiving = 0
        self.done: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._pieces = pieces_of(self.sizes_bytes, self.piece_bytes)
        self._missing = set(range(len(self._pieces)))
        self._idle: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> TensorRef:
        """The first tensor of which something has not begun to come; the last one where all has."""
        return self.refs[self._pieces[min(self._missing, default=-1)][0]]

    @property
    def in_one_piece(self) -> bool:
        return len(self._pieces) == 1

    async def wait(self) -> None:
        """Until all of it is here. Raises what ``fail`` was given, or TensorFetchTimeout at the deadline."""
        if not self.done.done():
            self._timer = self._loop.call_at(self.deadline, self._expire)
        await self.done

    def place(self, piece: int, size_bytes: int) -> ByteRange | None:
        """Where an arriving piece goes, or None where it is not wanted: too late, twice, or of the wrong size."""
        if self.done.done() or piece not in self._missing or self._loop.time() >= self.deadline:
            return None
        tensor, start, stop = self._pieces[piece]
        return self.memories[tensor].range(start, stop) if stop - start == size_bytes else None

    def begin_piece(self, piece: int) -> Callable[[Exception | None], None]:
        """A piece is being received; call what this returns when it is here."""
        self._missing.discard(piece)
        self.receiving += 1
        return self._end_piece

    def expect_whole(self, look_first: Callable[[], None]) -> Callable[[Exception | None], None]:
        """The tensor's one piece is awaited in memory of ours; call what this returns when something has come for it.

        An owner without that tensor says so, and sends a byte to free the memory: ``look_first`` hears what it said.
        """
        self.receiving += 1

        def done(error: Exception | None) -> None:
            if error is None:
                self._missing.clear()
                look_first()
            self._end_piece(error)

        return done

    def _end_piece(self, error: Exception | None) -> None:
        self.receiving -= 1
        if error is not None:
            self.fail(TensorOwnerLost(self.awaited, f"its owner was lost in the middle of it ({error})"))
        elif not self._missing and not self.receiving:
            # After the deadline the owner may have given the memory up, so that what was read may be anything.
            if self._loop.time() >= self.deadline:
                self._expire()
            elif not self.done.done():
                self.done.set_result(None)
        if not self.receiving and self._idle is not None:
            self._idle.set()

    def requested(self, error: Exception | None) -> None:
        """The request has left, or could not."""
        if error is not None:
            self.fail(TensorOwnerLost(self.awaited, f"its owner is gone ({error})"))

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def _expire(self) -> None:
        state = "the owner did not answer" if self.nothing_came() else "only a part of it came"
        self.fail(TensorFetchTimeout(self.awaited, f"{state} by the deadline; is the owner alive and not blocked?"))

    def nothing_came(self) -> bool:
        """Whether no piece has begun to arrive."""
        return len(self._missing) == len(self._pieces)

    def stop(self) -> None:
        """No more pieces are wanted."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # seen: it is not an error that nobody waits for it any more

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether, within ``timeout_s``, nothing was being received any more."""
        if not self.receiving:
            return True
        self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


async def copy_in_slices(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)``, letting the event loop run in between and stopping where it is cancelled."""
    if target.device.type != "cpu" or source.device.type != "cpu" or target.nbytes <= _SLICE_BYTES:
        target.copy_(source)
        return
    flat_target, flat_source = target.reshape(-1), source.reshape(-1)
    step = _SLICE_BYTES // target.element_size()
    for start in range(0, flat_target.numel(), step):
        flat_target[start : start + step].copy_(flat_source[start : start + step])
        await asyncio.sleep(0)
