"""In which order prompts are prefilled (TetriInfer, section 3.3.1), and how they are cut into chunks (3.3.3).

Prompts wait in two queues: raw, in the order of arrival, and scheduled, in the order of the policy. Whenever the
scheduled queue is empty, the first ``batch`` of the raw one (the paper's PrefillSchedBatch) are sorted into it. That is
what bounds starvation: the prompts of a batch are all before those of the next, so that **nobody is overtaken by more
than batch - 1 others**, whatever arrives. With one prompt a batch, every order is the order of arrival.

``SRF`` is ours; the paper leaves preemption to future work. There are no batches: before every chunk the prompt goes
first that has the fewest tokens left, so that a short one need not wait until a long one that has begun is done. Every
second of waiting counts as ``ageing`` tokens less. As all that wait age alike, the order is that of

    tokens left + ageing * arrival,

in which no clock occurs. It bounds starvation in time: **nobody with n tokens is overtaken by one who arrives more than
n / ageing seconds later.**
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum


class PrefillOrder(StrEnum):
    """First come first served, shortest or longest job first, and shortest remaining first with preemption."""

    FCFS = "fcfs"
    SJF = "sjf"
    LJF = "ljf"
    SRF = "srf"


@dataclass(slots=True, order=True)
class _Waiting:
    key: float
    number: int
    name: str
    left: int
    arrived_s: float


@dataclass(frozen=True, slots=True)
class ChunkPiece:
    """``count`` tokens of a prompt; ``last``: they are its last ones."""

    name: str
    count: int
    last: bool


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """One forward pass's prompt tokens. ``padding``: how many are missing to a full chunk."""

    pieces: tuple[ChunkPiece, ...]
    padding: int


class PrefillSchedule:
    """One instance's prompts.

    Args:
        batch: the paper's PrefillSchedBatch; ``SRF`` has no use for it.
        ageing: tokens a second of waiting is worth, for ``SRF``.
        merges_batches: whether a chunk goes on with the next batch. The paper's does not: the last chunk of each batch
            is padded. Ours is padded only where nothing waits any more.
    """

    def __init__(
        self,
        order: PrefillOrder = PrefillOrder.FCFS,
        batch: int = 16,
        ageing: float = 0.0,
        merges_batches: bool = True,
    ) -> None:
        if batch < 1 or ageing < 0:
            raise ValueError("a batch has at least one prompt, and ageing is not below 0")
        self.order = order
        self._batch = batch
        self._ageing = ageing
        self._merges_batches = merges_batches
        self._waiting: dict[str, _Waiting] = {}
        self._raw: list[_Waiting] = []  # by number
        self._scheduled: list[_Waiting] = []  # by key, then number
        self._newest_scheduled = -1
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """How many wait to be computed."""
        return self._tokens

    def add(self, name: str, tokens: int, number: int, arrived_s: float) -> None:
        """A prompt waits. ``number`` is its place in the order of arrival.

        One that comes back, older than what is scheduled already, is scheduled too: it has waited for its batch before.
        """
        waiting = _Waiting(0.0, number, name, tokens, arrived_s)
        self._waiting[name] = waiting
        self._tokens += tokens
        if self.order is PrefillOrder.SRF or number <= self._newest_scheduled:
            self._schedule(waiting)
        else:
            insort(self._raw, waiting, key=lambda other: other.number)

    def remove(self, name: str) -> None:
        """It is not waited for any more; nothing if it is not here."""
        waiting = self._waiting.pop(name, None)
        if waiting is not None:
            self._tokens -= waiting.left
            self._take_out(waiting)

    def computed(self, name: str, tokens: int) -> None:
        """So many more of its tokens are; when all are, it waits no more."""
        waiting = self._waiting[name]
        if tokens >= waiting.left:
            self.remove(name)
            return
        moves = self.order is PrefillOrder.SRF
        if moves:
            self._take_out(waiting)
        waiting.left -= tokens
        self._tokens -= tokens
        if moves:
            self._schedule(waiting)

    def left(self, name: str) -> int:
        return self._waiting[name].left

    def head(self, chunk_begun: bool = False) -> str | None:
        """Whose tokens come next; None: nobody's, or (``chunk_begun``) nobody's in the same chunk."""
        if not self._scheduled and not (chunk_begun and not self._merges_batches):
            batch, self._raw = self._raw[: self._batch], self._raw[self._batch :]
            for waiting in batch:
                self._schedule(waiting)
        return self._scheduled[0].name if self._scheduled else None

    def next_chunk(self, chunk_tokens: int) -> PromptChunk:
        """The next chunk, counted as computed: prompts in order, sliced and merged until it is full."""
        pieces: list[ChunkPiece] = []
        room = chunk_tokens
        while room and (name := self.head(bool(pieces))) is not None:
            left = self.left(name)
            count = min(left, room)
            pieces.append(ChunkPiece(name, count, count == left))
            room -= count
            self.computed(name, count)
        return PromptChunk(tuple(pieces), room)

    def _schedule(self, waiting: _Waiting) -> None:
        match self.order:
            case PrefillOrder.FCFS:
                waiting.key = 0.0
            case PrefillOrder.SJF:
                waiting.key = waiting.left
            case PrefillOrder.LJF:
                waiting.key = -waiting.left
            case PrefillOrder.SRF:
                waiting.key = waiting.left + self._ageing * waiting.arrived_s
        insort(self._scheduled, waiting)
        self._newest_scheduled = max(self._newest_scheduled, waiting.number)

    def _take_out(self, waiting: _Waiting) -> None:
        """Out of whichever queue it is in."""
        place = bisect_left(self._scheduled, waiting)
        if place < len(self._scheduled) and self._scheduled[place] is waiting:
            del self._scheduled[place]
        else:
            del self._raw[bisect_left(self._raw, waiting.number, key=lambda other: other.number)]
