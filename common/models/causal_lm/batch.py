"""What one forward pass computes: chunks of several sequences, packed one behind the other without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.models.causal_lm.errors import WrongChunkError
from common.models.causal_lm.native import Kernels
from common.models.causal_lm.paging import BlockTable, KVPool, slots_of


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence.

    Attributes:
        sequence: its name, for messages.
        tokens: the new token ids, at least one.
        start: the position of the first of them; keys and values of all positions before lie in the blocks.
        table: the sequence's blocks, with room for the new tokens.
        logits: whether the logits after the last of them are wanted.
    """

    sequence: str
    tokens: Sequence[int]
    start: int
    table: BlockTable
    logits: bool = True


@dataclass(slots=True)
class Segment:
    """One chunk's place in the batch, and what its tokens attend to.

    Attributes:
        first, end: the rows of the batch that are its tokens.
        start: the position of its first token.
    """

    first: int
    end: int
    start: int
    table: BlockTable
    # What follows from the sliding window, once for all layers that have the same one.
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    slots: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.end - self.first

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.start + self.end - self.first


@dataclass(frozen=True, slots=True)
class Singles:
    """The chunks of one token, as the decode kernel takes them: see ``Kernels.attend``."""

    rows: Tensor
    spans: Tensor
    first_span: Tensor


@dataclass(frozen=True, slots=True)
class Runs:
    """All chunks and what they see, as ``packed`` takes them.

    Attributes:
        rows: [chunks + 1] int64, where each one's tokens begin in the batch.
        spans: [runs, 2] int64, slots from and up to.
        first_span: [chunks + 1] int64, where each one's runs begin.
    """

    rows: Tensor
    spans: Tensor
    first_span: Tensor


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the chunks of several tokens, for a kernel that takes all of them at once.

    Attributes:
        rows: which tokens of the batch are theirs; None: all, in order.
        queries, keys: [chunks + 1] int32, where each one's tokens begin, and where what they attend to does.
        most_queries, most_keys: of one chunk.
        slots: [all keys], where they lie in the pool.
    """

    rows: Tensor | None
    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Paged:
    """The chunks of one token, as a GPU's decode kernel takes them: see ``GpuKernels.attend``.

    Attributes:
        rows: which tokens of the batch are meant; None: all, in order.
    """

    rows: Tensor | None
    positions: Tensor
    tables: Tensor


@dataclass(slots=True)
class Batch:
    """Chunks as tensors.

    Attributes:
        input_ids, positions: [tokens], int64.
        slots: [tokens], where each token's keys and values go.
        segments: one for each chunk, in order.
        wanted: [chunks whose logits are wanted], the rows of their last tokens; None: every row, in order.
        pool: the blocks that all of this is about.
        kernels: ours; None: there are none, torch's do.
        stored: told each layer whose keys and values of all tokens are in the pool, while the layer is still computed
            or right after.
        singles, runs: for our kernels, from the first layer on, for each width of the window.
        lengths, paged: the same on a GPU, for chunks of several tokens and of one.
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    segments: list[Segment]
    wanted: Tensor | None
    pool: KVPool
    kernels: Kernels | None = None
    stored: Callable[[int], None] | None = None
    lengths: Lengths | None = None
    paged: Paged | None = None
    singles: dict[int, Singles | None] = field(default_factory=dict)
    runs: dict[int, Runs] = field(default_factory=dict)

    def runs_within(self, window: int) -> Runs:
        """All chunks, each with what any of its tokens sees of the last `window` positions (0: all)."""
        if window not in self.runs:
            self.runs[window] = _runs(self.segments, window)
        return self.runs[window]

    def singles_within(self, window: int) -> Singles | None:
        """The chunks of one token, each with the last `window` positions (0: all); None if there are none."""
        if window not in self.singles:
            self.singles[window] = _singles(self.segments, window)
        return self.singles[window]


def pack(
    chunks: Sequence[Chunk],
    pool: KVPool,
    context: int,
    device: torch.device,
    kernels: Kernels | None = None,
    stored: Callable[[int], None] | None = None,
) -> Batch:
    """Make a batch of chunks.

    Args:
        context: how many positions the model knows.
        stored: see ``Batch``.

    Raises:
        WrongChunkError: no chunk, an empty one, one beyond its block table or beyond the model's context.
    """
    if not chunks:
        raise WrongChunkError("a batch needs at least one chunk")
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    segments: list[Segment] = []
    for chunk in chunks:
        first, stop = len(ids), chunk.start + len(chunk.tokens)
        check(chunk, context)
        ids += chunk.tokens
        if len(chunk.tokens) == 1:
            positions.append(chunk.start)
            slots.append(chunk.table.slot(chunk.start))
        else:
            positions += range(chunk.start, stop)
            slots += slots_of(chunk.table.spans(chunk.start, stop))
        segments.append(Segment(first, len(ids), chunk.start, chunk.table))
        if chunk.logits:
            wanted.append(len(ids) - 1)
    rows = None if len(wanted) == len(ids) else torch.tensor(wanted, dtype=torch.int64, device=device)
    packed = torch.tensor([ids, positions, slots], dtype=torch.int64, device=device)
    return Batch(packed[0], packed[1], packed[2], segments, rows, pool, kernels, stored)


def _singles(segments: Sequence[Segment], window: int) -> Singles | None:
    rows: list[int] = []
    spans: list[tuple[int, int]] = []
    first_span = [0]
    for segment in segments:
        if segment.count == 1:
            low = max(0, segment.stop - window) if window else 0
            rows.append(segment.first)
            spans += segment.table.spans(low, segment.stop)
            first_span.append(len(spans))
    return Singles(torch.tensor(rows), torch.tensor(spans), torch.tensor(first_span)) if rows else None


def _runs(segments: Sequence[Segment], window: int) -> Runs:
    rows, spans, first_span = [0], list[tuple[int, int]](), [0]
    for segment in segments:
        low = max(0, segment.start - window + 1) if window else 0
        spans += segment.table.spans(low, segment.stop)
        rows.append(segment.end)
        first_span.append(len(spans))
    return Runs(torch.tensor(rows), torch.tensor(spans), torch.tensor(first_span))


def check(chunk: Chunk, context: int) -> None:
    """Raises WrongChunkError, see ``pack``."""
    stop = chunk.start + len(chunk.tokens)
    if not chunk.tokens or chunk.start < 0:
        raise WrongChunkError(f"{chunk.sequence}: {len(chunk.tokens)} tokens at {chunk.start} are no chunk")
    if stop > chunk.table.tokens:
        raise WrongChunkError(f"{chunk.sequence}: {stop} tokens do not fit into {chunk.table.tokens} of its blocks")
    if stop > context:
        raise WrongChunkError(
            f"{chunk.sequence}: {stop} tokens, the model knows {context} positions: shorten the prompt"
        )
