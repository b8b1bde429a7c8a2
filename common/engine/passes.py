"""One forward pass: blocks for what is computed, the model, and the tokens that come of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from common.engine.request import Output
from common.engine.sequence import Computed
from common.messages.chat import unpack_tokens
from common.models.causal_lm import CausalLM, Chunk, KVPool
from common.models.causal_lm.sampling import sample
from common.policies.language.batching_events import Piece


@dataclass(slots=True)
class EngineCounts:
    """What an engine has done so far.

    In tokens: computed before a sequence's next token, and found in the memory. ``preempted``: how often one was.
    """

    prefilled: int = 0
    found: int = 0
    preempted: int = 0


class ForwardPasses:
    """Those of one engine, over its ``sequences`` by name. ``counts`` is told what was computed and found.

    ``layer_stored`` is told the chunks of a pass and a layer whose keys and values of them are in the pool, within the
    pass; only where anything of it is to be parked.
    """

    def __init__(self, model: CausalLM, pool: KVPool, sequences: Mapping[str, Computed], counts: EngineCounts) -> None:
        self._model = model
        self._pool = pool
        self._sequences = sequences
        self._counts = counts
        self.layer_stored: Callable[[Sequence[Chunk], int], None] | None = None

    def run(self, pieces: tuple[Piece, ...]) -> list[Output]:
        """Compute these, in blocks that are there; the tokens that came of it."""
        self._share(pieces)
        chunks = [self._chunk(piece) for piece in pieces]
        stored = None
        if self.layer_stored is not None and any(self._sequences[piece.sequence].request.park for piece in pieces):
            stored = partial(self.layer_stored, chunks)
        logits = self._model.forward(chunks, self._pool, stored)
        self._note(pieces)
        names = [piece.sequence for piece in pieces if piece.last]
        speaking = [self._sequences[name] for name in names]
        parameters = [sequence.request.sampling for sequence in speaking]
        sampled = sample(logits, parameters, [sequence.history for sequence in speaking]) if speaking else []
        ends = self._model.end_tokens
        return [sequence.take(name, one, ends) for name, sequence, one in zip(names, speaking, sampled, strict=True)]

    def _share(self, pieces: tuple[Piece, ...]) -> None:
        """Give those who begin in the midst of their tokens the blocks of what is before."""
        beginning = [(piece, one) for piece in pieces if not (one := self._sequences[piece.sequence]).blocks.addresses]
        for piece, sequence in beginning:
            sequence.blocks.share(sequence.span(0, piece.start))
            sequence.computed = piece.start
            self._counts.found += piece.start
            if sequence.cached is None:
                sequence.cached = piece.start
        # Only now, as it may take evicting what nobody holds.
        for _, sequence in beginning:
            sequence.blocks.bring()

    def _chunk(self, piece: Piece) -> Chunk:
        sequence = self._sequences[piece.sequence]
        if piece.new_blocks:
            sequence.blocks.grow(piece.new_blocks)
        tokens = unpack_tokens(sequence.span(piece.start, piece.start + piece.count))
        return Chunk(piece.sequence, tokens, piece.start, sequence.blocks.table, piece.last)

    def _note(self, pieces: tuple[Piece, ...]) -> None:
        """These are computed now. What a prompt's end completes is kept for others while it goes on."""
        for piece in pieces:
            sequence = self._sequences[piece.sequence]
            sequence.computed = piece.start + piece.count
            if not sequence.prefilled:
                self._counts.prefilled += piece.count
                sequence.prefilled = piece.last
                if piece.last and sequence.keeps:
                    sequence.blocks.keep(sequence.known)
