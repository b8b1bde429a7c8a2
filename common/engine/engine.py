"""The loop of one instance: ask the policy, run the model, choose tokens, tell the policy what came of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerFast

from common.engine.request import Finish, Output, Request
from common.mempool.allocator import BlockAllocator
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, Chunk, KVPool
from common.models.causal_lm.sampling import History, Sampled, sample
from common.models.causal_lm.text import Detokenizer, StopStrings
from common.policies.continuous_batching import (
    ContinuousBatching,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    SequenceLeft,
    StepDue,
    StepFinished,
)


class RequestRefused(ValueError):
    """A request can never be answered here: it is longer than the model's context or the pool."""


@dataclass(slots=True)
class _Sequence:
    request: Request
    tokens: list[int]
    history: History
    detokenizer: Detokenizer | None
    stops: StopStrings
    table: BlockTable = field(default_factory=BlockTable)
    parked: bool = False


class Engine:
    """Answers requests; every call of ``step`` is one forward pass.

    Args:
        model: with the pool made for its layout.
        tokenizer: for text and stop strings; None: answers have tokens alone.
        chunk_tokens, most_sequences: see ``ContinuousBatching``.
        allocator: the books of the pool, if others use it too.
    """

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chunk_tokens: int = 512,
        most_sequences: int = 256,
        allocator: BlockAllocator | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._tokenizer = tokenizer
        self.allocator = allocator or BlockAllocator(pool.blocks.shape[0])
        self._chunk_tokens = chunk_tokens
        self._most_sequences = most_sequences
        self._batching = self._new_batching()
        self._sequences: dict[str, _Sequence] = {}
        self._parked = 0
        self.layer_stored: Callable[[Sequence[Chunk], int], None] | None = None
        """Told the chunks of a step and a layer whose keys and values of them are in the pool, within the step."""
        self.computed: tuple[Piece, ...] = ()
        """What the last step computed."""
        self.stalled = False
        """Whether the last step could do nothing: blocks that others hold are waited for."""

    def _new_batching(self) -> ContinuousBatching:
        return ContinuousBatching(self.allocator.blocks, BLOCK_TOKENS, self._chunk_tokens, self._most_sequences)

    @property
    def pool(self) -> KVPool:
        return self._pool

    @property
    def context(self) -> int:
        """How many tokens a sequence may have, for the model and for the pool."""
        return min(self._model.context, self.allocator.blocks * BLOCK_TOKENS)

    @property
    def busy(self) -> bool:
        """Whether any answer is to be computed here and not at its end."""
        return len(self._sequences) > self._parked

    def check(self, name: str, request: Request) -> None:
        """Whether the request could be answered here at all; at any time, during a step too.

        Raises:
            RequestRefused: it does not fit, or needs a tokenizer where there is none.
        """
        needed = request.computed_tokens
        if needed > self._model.context:
            raise RequestRefused(
                f"{name}: prompt and answer have {needed + 1} tokens, the context {self._model.context}"
            )
        if request.stops and self._tokenizer is None:
            raise RequestRefused(f"{name}: stop strings need a tokenizer")
        if not all(0 <= token < self._model.vocabulary for token in (*request.prompt, *request.answered)):
            raise RequestRefused(f"{name}: a token is none of the model's {self._model.vocabulary}")
        blocks = self._pool.layout.blocks_for(needed)
        if blocks > self.allocator.blocks:
            raise RequestRefused(f"{name}: {needed} tokens take {blocks} blocks, the pool has {self.allocator.blocks}")

    def add(self, name: str, request: Request, now_s: float) -> None:
        """Take in a request.

        Raises:
            RequestRefused: see ``check``.
            ValueError: the name is in use.
        """
        self._take_in(name, request, BlockTable(), 0, now_s)

    def adopt(self, name: str, request: Request, blocks: Sequence[int], now_s: float) -> None:
        """Take in a request whose keys and values are here already, but for the last token's.

        Args:
            blocks: held for this sequence; they are the engine's from now on.

        Raises:
            RequestRefused, ValueError: see ``add``; the blocks stay the caller's.
        """
        computed = len(request.prompt) + len(request.answered) - 1
        self._take_in(name, request, BlockTable(blocks), computed, now_s)

    def _take_in(self, name: str, request: Request, table: BlockTable, computed: int, now_s: float) -> None:
        if name in self._sequences:
            raise ValueError(f"{name} is being answered already")
        self.check(name, request)
        tokens = [*request.prompt, *request.answered]
        arrival = SequenceArrived(name, len(tokens), request.computed_tokens, computed, len(table.blocks))
        for decision in self._batching.handle(arrival, now_s):
            if isinstance(decision, RefuseSequence):
                raise RequestRefused(f"{name}: {decision.reason}")
        history = History(frozenset(request.prompt), Counter(request.answered), len(request.answered))
        detokenizer = Detokenizer(self._tokenizer) if self._tokenizer is not None else None
        self._sequences[name] = _Sequence(request, tokens, history, detokenizer, StopStrings(request.stops), table)

    def parked(self, name: str) -> BlockTable | None:
        """The blocks of a parked sequence, the last token's keys and values not in them; None: it is not parked."""
        sequence = self._sequences.get(name)
        return sequence.table if sequence is not None and sequence.parked else None

    def table(self, name: str) -> BlockTable | None:
        """The blocks of a sequence, of which the engine is to stay the only writer; None: there is no such sequence."""
        sequence = self._sequences.get(name)
        return None if sequence is None else sequence.table

    def cancel(self, name: str, now_s: float) -> None:
        """Give an answer up, or what is parked of it; nothing if it is at its end."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self._parked -= sequence.parked
            self.allocator.release(sequence.table.blocks)
            self._batching.handle(SequenceLeft(name), now_s)

    def abandon(self) -> list[str]:
        """After a step that failed half-way: give up all that was being computed, and be fit for more.

        Returns:
            The names of the sequences. What is parked stays.
        """
        lost = [name for name, sequence in self._sequences.items() if not sequence.parked]
        for name in lost:
            self.allocator.release(self._sequences.pop(name).table.blocks)
        self._batching = self._new_batching()
        return lost

    def step(self, now_s: float) -> list[Output]:
        """One forward pass; the tokens that came of it. None while prompts are only partly computed."""
        step = self._plan(now_s)
        self.computed = () if step is None else step.pieces
        self.stalled = step is None
        if step is None:
            return []
        outputs = self._run(step.pieces)
        self._batching.handle(StepFinished(self._leaving(outputs)), now_s)
        return outputs

    def _plan(self, now_s: float) -> RunStep | None:
        """What to compute, after as many preemptions as it takes; None: nothing can be."""
        while True:
            decisions = self._batching.handle(StepDue(self.allocator.free_blocks), now_s)
            for decision in decisions:
                if isinstance(decision, RunStep):
                    return decision
                if isinstance(decision, PreemptSequence):
                    sequence = self._sequences[decision.sequence]
                    self.allocator.release(sequence.table.blocks)
                    sequence.table = BlockTable()
            if not decisions:
                return None

    def _leaving(self, outputs: list[Output]) -> frozenset[str]:
        """Who takes no part in further steps: the blocks of those at their end are free, others are parked in them."""
        leaving = []
        for output in outputs:
            name = output.sequence
            if output.finish is not None:
                self.allocator.release(self._sequences.pop(name).table.blocks)
            elif self._sequences[name].request.park:
                self._sequences[name].parked = True
                self._parked += 1
            else:
                continue
            leaving.append(name)
        return frozenset(leaving)

    def _run(self, pieces: tuple[Piece, ...]) -> list[Output]:
        chunks = [self._chunk(piece) for piece in pieces]
        stored = None
        if self.layer_stored is not None and any(self._sequences[piece.sequence].request.park for piece in pieces):
            stored = partial(self.layer_stored, chunks)
        logits = self._model.forward(chunks, self._pool, stored)
        names = [piece.sequence for piece in pieces if piece.last]
        speaking = [self._sequences[name] for name in names]
        parameters = [sequence.request.sampling for sequence in speaking]
        sampled = sample(logits, parameters, [sequence.history for sequence in speaking]) if speaking else []
        return [self._take(*named) for named in zip(names, speaking, sampled, strict=True)]

    def _chunk(self, piece: Piece) -> Chunk:
        sequence = self._sequences[piece.sequence]
        if piece.new_blocks:
            blocks = sequence.table.blocks
            new = self.allocator.allocate(piece.new_blocks, blocks[-1] if blocks else None)
            if new is None:
                raise RuntimeError(f"{piece.sequence}: the policy gave out {piece.new_blocks} blocks that are not free")
            sequence.table.extend(new)
        tokens = sequence.tokens[piece.start : piece.start + piece.count]
        return Chunk(piece.sequence, tokens, piece.start, sequence.table, piece.last)

    def _take(self, name: str, sequence: _Sequence, sampled: Sampled) -> Output:
        """Note a sequence's new token, and see whether it is the last."""
        token = sampled.token
        sequence.tokens.append(token)
        sequence.history.add(token)
        finish: Finish | None = None
        text = ""
        if token in sequence.request.stop_tokens or (
            token in self._model.end_tokens and not sequence.request.ignore_end
        ):
            finish = Finish.STOP
        elif sequence.detokenizer is not None:
            text = sequence.stops.add(sequence.detokenizer.add(token))
        if sequence.stops.stopped is not None:
            finish = Finish.STOP
        elif finish is None and sequence.history.drawn == sequence.request.most_tokens:
            finish = Finish.LENGTH
        if finish is not None and sequence.stops.stopped is None and sequence.detokenizer is not None:
            text += sequence.stops.add(sequence.detokenizer.finish()) + sequence.stops.finish()
        return Output(name, sampled, text, finish)
