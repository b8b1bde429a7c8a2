"""The loop of one instance: ask the policy, run the model, choose tokens, tell the policy what came of it."""

from dataclasses import dataclass, field

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
        self._batching = ContinuousBatching(self.allocator.blocks, BLOCK_TOKENS, chunk_tokens, most_sequences)
        self._sequences: dict[str, _Sequence] = {}

    @property
    def busy(self) -> bool:
        """Whether any answer is not at its end."""
        return bool(self._sequences)

    def add(self, name: str, request: Request, now_s: float) -> None:
        """Take in a request.

        Raises:
            RequestRefused: it does not fit, or needs a tokenizer where there is none.
            ValueError: the name is in use.
        """
        if name in self._sequences:
            raise ValueError(f"{name} is being answered already")
        most = len(request.prompt) + request.most_tokens
        # The last token is never computed, so its position need not be known.
        if most - 1 > self._model.context:
            raise RequestRefused(f"{name}: prompt and answer have {most} tokens, the context {self._model.context}")
        if request.stops and self._tokenizer is None:
            raise RequestRefused(f"{name}: stop strings need a tokenizer")
        arrival = SequenceArrived(name, len(request.prompt), most - 1)
        for decision in self._batching.handle(arrival, now_s):
            if isinstance(decision, RefuseSequence):
                raise RequestRefused(f"{name}: {decision.reason}")
        self._sequences[name] = _Sequence(
            request,
            list(request.prompt),
            History(frozenset(request.prompt)),
            Detokenizer(self._tokenizer) if self._tokenizer is not None else None,
            StopStrings(request.stops),
        )

    def cancel(self, name: str, now_s: float) -> None:
        """Give an answer up; nothing if it is at its end."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self.allocator.release(sequence.table.blocks)
            self._batching.handle(SequenceLeft(name), now_s)

    def step(self, now_s: float) -> list[Output]:
        """One forward pass; the tokens that came of it. None while prompts are only partly computed."""
        outputs: list[Output] = []
        for decision in self._batching.handle(StepDue(self.allocator.free_blocks), now_s):
            if isinstance(decision, PreemptSequence):
                sequence = self._sequences[decision.sequence]
                self.allocator.release(sequence.table.blocks)
                sequence.table = BlockTable()
            elif isinstance(decision, RunStep):
                outputs = self._run(decision.pieces)
                ended = frozenset(output.sequence for output in outputs if output.finish is not None)
                for name in ended:
                    self.allocator.release(self._sequences.pop(name).table.blocks)
                self._batching.handle(StepFinished(ended), now_s)
        return outputs

    def _run(self, pieces: tuple[Piece, ...]) -> list[Output]:
        logits = self._model.forward([self._chunk(piece) for piece in pieces], self._pool)
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
        if token in self._model.end_tokens and not sequence.request.ignore_end:
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
