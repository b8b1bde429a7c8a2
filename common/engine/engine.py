"""The loop of one instance: ask the policy, run the model, choose tokens, tell the policy what came of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.engine.blocks import Prefixes, SequenceBlocks
from common.engine.passes import EngineCounts, ForwardPasses
from common.engine.request import Output, Request
from common.engine.sequence import Computed
from common.mempool.address import TOKEN_BYTES, Address
from common.mempool.allocator import BlockAllocator
from common.mempool.caching import Caching
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier
from common.messages.chat import tokens_in
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, KVPool
from common.policies.language.batching_events import (
    LengthPredicted,
    Piece,
    PreemptSequence,
    RefuseSequence,
    RunStep,
    SequenceArrived,
    SequenceComing,
    SequenceLeft,
    StepDue,
    StepFinished,
)
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.continuous_batching import ContinuousBatching


class RequestRefused(ValueError):
    """A request can never be answered here: it is longer than the model's context or the pool."""


class Engine:
    """Answers requests; every call of ``step`` is one forward pass.

    Args:
        model: with the pool made for its layout.
        tokenizer: for text and stop strings; None: answers have tokens alone.
        chunk_tokens, most_sequences: see ``ContinuousBatching``.
        memory: the pool with its books, and with what is kept in it; None: they are made here.
        caching: what is kept.
        rules: whose prompt comes next, who is let in, and who leaves where blocks are too few.
    """

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chunk_tokens: int = 512,
        most_sequences: int = 256,
        memory: MemPool | None = None,
        caching: Caching = Caching.PD_BASIC,
        rules: BatchingRules | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._tokenizer = tokenizer
        self.memory = memory or MemPool("", Tier.over(pool.blocks))
        self.caching = caching
        self._chunk_tokens = chunk_tokens
        self._most_sequences = most_sequences
        self._rules = rules or BatchingRules()
        self._batching = self._new_batching()
        self._sequences: dict[str, Computed] = {}
        self._parked = 0
        self._awaited = 0
        self.computed: tuple[Piece, ...] = ()
        """What the last step computed."""
        self.counts = EngineCounts()
        self.passes = ForwardPasses(model, pool, self._sequences, self.counts)
        self.stalled = False
        """Whether the last step could do nothing: blocks that others hold are waited for."""

    def _new_batching(self) -> ContinuousBatching:
        return self._rules.batching(self.allocator.blocks, BLOCK_TOKENS, self._chunk_tokens, self._most_sequences)

    @property
    def allocator(self) -> BlockAllocator:
        """The books of the blocks that the model computes with."""
        return self.memory.hbm.allocator

    @property
    def pool(self) -> KVPool:
        return self._pool

    @property
    def context(self) -> int:
        """How many tokens a sequence may have, for the model and for the pool."""
        return min(self._model.context, self.allocator.blocks * BLOCK_TOKENS)

    @property
    def goes_by_predictions(self) -> bool:
        """Whether it matters how many tokens a sequence is predicted to come to have."""
        return self._rules.admission.goes_by_predictions

    @property
    def waiting(self) -> int:
        """How many sequences wait for blocks."""
        return self._batching.waiting

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
        if np.frombuffer(request.prompt + request.answered, "<u4").max() >= self._model.vocabulary:
            raise RequestRefused(f"{name}: a token is none of the model's {self._model.vocabulary}")
        blocks = self._pool.layout.blocks_for(needed)
        if blocks > self.allocator.blocks:
            raise RequestRefused(f"{name}: {needed} tokens take {blocks} blocks, the pool has {self.allocator.blocks}")

    def add(self, name: str, request: Request, now_s: float, expected_tokens: int = 0) -> None:
        """Take in a request.

        Args:
            expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.

        Raises:
            RequestRefused: see ``check``.
            ValueError: the name is in use.
        """
        self._take_in(name, request, (), 0, now_s, expected_tokens)

    def adopt(
        self, name: str, request: Request, addresses: Sequence[Address], now_s: float, expected_tokens: int = 0
    ) -> None:
        """Take in a request whose keys and values are here already, but for the last token's.

        Args:
            addresses: of blocks held for this sequence; they are the engine's from now on.
            expected_tokens: see ``add``.

        Raises:
            RequestRefused, ValueError: see ``add``; the blocks stay the caller's.
        """
        computed = tokens_in(request.prompt) + tokens_in(request.answered) - 1
        self._take_in(name, request, addresses, computed, now_s, expected_tokens)
        sequence = self._sequences[name]
        if sequence.keeps:
            sequence.blocks.keep(sequence.known)

    def expect(self, name: str, expected_tokens: int, now_s: float) -> None:
        """It is predicted only now how many tokens a sequence will come to have; nothing if it is at its end."""
        if (sequence := self._sequences.get(name)) is not None:
            sequence.expected_tokens = expected_tokens
        self._batching.handle(LengthPredicted(name, expected_tokens), now_s)

    def refusal(self, tokens: int, expected_tokens: int, held_blocks: int = 0) -> str | None:
        """Why a sequence that another instance has computed gets no blocks here now; None: it may have them.

        Args:
            tokens: how many it will have when it is adopted.
            expected_tokens: see ``add``.
            held_blocks: how many of its blocks are here and held already.
        """
        return self._batching.refusal(tokens, expected_tokens, self.memory.available_blocks + held_blocks)

    def await_one(self, tokens: int, expected_tokens: int, now_s: float) -> str:
        """Blocks are held for a sequence that is on its way here. Returns what ``await_no_more`` is to be told."""
        self._awaited += 1
        name = f"awaited {self._awaited}"
        self._batching.handle(SequenceComing(name, tokens, expected_tokens), now_s)
        return name

    def await_no_more(self, name: str, now_s: float) -> None:
        """It was adopted, or does not come."""
        self._batching.handle(SequenceLeft(name), now_s)

    def _take_in(
        self,
        name: str,
        request: Request,
        addresses: Sequence[Address],
        computed: int,
        now_s: float,
        expected_tokens: int,
    ) -> None:
        if name in self._sequences:
            raise ValueError(f"{name} is being answered already")
        self.check(name, request)
        tokens = tokens_in(request.prompt) + tokens_in(request.answered)
        arrival = SequenceArrived(name, tokens, request.computed_tokens, computed, len(addresses), expected_tokens)
        for decision in self._batching.handle(arrival, now_s):
            if isinstance(decision, RefuseSequence):
                raise RequestRefused(f"{name}: {decision.reason}")
        keeps = self.caching.keeps_received if addresses else self.caching.keeps_computed
        sequence = Computed.of(request, self._tokenizer, SequenceBlocks(self.memory, addresses), keeps)
        sequence.computed, sequence.prefilled = computed, bool(addresses)
        sequence.expected_tokens = expected_tokens
        self._sequences[name] = sequence

    def parked(self, name: str) -> BlockTable | None:
        """The blocks of a parked sequence, the last token's keys and values not in them; None: it is not parked."""
        sequence = self._sequences.get(name)
        return sequence.blocks.table if sequence is not None and sequence.parked else None

    def park(self, name: str, now_s: float) -> BlockTable | None:
        """Have an answer stand still, its blocks as they are, for somebody who goes on from there.

        Returns:
            Its blocks; None: there is no such answer, or it is not at a point from which one can go on: it is parked
            already, waits, or has tokens to be computed before the next one.
        """
        sequence = self._sequences.get(name)
        if sequence is None or sequence.parked or not sequence.decoding:
            return None
        sequence.parked = True
        self._parked += 1
        self._batching.handle(SequenceLeft(name), now_s)
        return sequence.blocks.table

    def resume(self, name: str, now_s: float) -> None:
        """Go on with what stands still, by ``park`` or its request; nothing if it was given up meanwhile."""
        sequence = self._sequences.get(name)
        if sequence is None or not sequence.parked:
            return
        sequence.request = replace(sequence.request, park=False)
        sequence.parked = False
        self._parked -= 1
        arrival = SequenceArrived(
            name,
            tokens_in(sequence.tokens),
            sequence.request.computed_tokens,
            sequence.computed,
            len(sequence.blocks.addresses),
            sequence.expected_tokens,
        )
        self._batching.handle(arrival, now_s)

    def waits(self, name: str) -> bool:
        """Whether it holds no blocks yet, or was made to give them up."""
        sequence = self._sequences.get(name)
        return sequence is not None and not sequence.blocks.addresses

    def table(self, name: str) -> BlockTable | None:
        """The blocks of a sequence, of which the engine is to stay the only writer; None: there is no such sequence."""
        sequence = self._sequences.get(name)
        return None if sequence is None else sequence.blocks.table

    def computed_tokens(self, name: str) -> int:
        """Of how many tokens of a sequence there are keys and values; 0: there is no such sequence."""
        sequence = self._sequences.get(name)
        return 0 if sequence is None else sequence.computed

    @property
    def waiting_blocks(self) -> int:
        """How many blocks those will take, to begin with, that wait for them."""
        waiting = [len(one.tokens) // TOKEN_BYTES for one in self._sequences.values() if not one.blocks.addresses]
        return sum(self._pool.layout.blocks_for(tokens) for tokens in waiting)

    def cancel(self, name: str, now_s: float) -> None:
        """Give an answer up, or what is parked of it; nothing if it is at its end."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self._parked -= sequence.parked
            sequence.blocks.release(sequence.known)
            self._batching.handle(SequenceLeft(name), now_s)

    def abandon(self) -> list[str]:
        """After a step that failed half-way: give up all that was being computed, and be fit for more.

        Returns:
            The names of the sequences. What is parked stays.
        """
        lost = [name for name, sequence in self._sequences.items() if not sequence.parked]
        for name in lost:
            self._sequences.pop(name).blocks.release()
        self._batching = self._new_batching()
        return lost

    def step(self, now_s: float) -> list[Output]:
        """One forward pass; the tokens that came of it. None while prompts are only partly computed."""
        step = self._plan(now_s)
        self.computed = () if step is None else step.pieces
        self.stalled = step is None
        if step is None:
            return []
        outputs = self.passes.run(step.pieces)
        self._batching.handle(StepFinished(self._leaving(outputs)), now_s)
        return outputs

    def _plan(self, now_s: float) -> RunStep | None:
        """What to compute, after as many preemptions as it takes; None: nothing can be."""
        while True:
            due = StepDue(self.memory.available_blocks, self._prefixes() if self.caching.keeps_computed else {})
            decisions = self._batching.handle(due, now_s)
            for decision in decisions:
                if isinstance(decision, RunStep):
                    return decision
                if isinstance(decision, PreemptSequence):
                    self.counts.preempted += 1
                    sequence = self._sequences[decision.sequence]
                    sequence.blocks.release(sequence.known)
                    sequence.computed, sequence.prefilled = 0, False
            if not decisions:
                return None

    def _prefixes(self) -> Prefixes:
        computing = [
            bytes(one.tokens) for one in self._sequences.values() if one.blocks.addresses and not one.prefilled
        ]
        return Prefixes(self.memory, lambda name: bytes(self._sequences[name].tokens), computing)

    def _leaving(self, outputs: list[Output]) -> frozenset[str]:
        """Who takes no part in further steps: the blocks of those at their end are free, others are parked in them."""
        leaving = []
        for output in outputs:
            name = output.sequence
            if output.finish is not None:
                sequence = self._sequences.pop(name)
                sequence.blocks.release(sequence.known)
            elif self._sequences[name].request.park:
                self._sequences[name].parked = True
                self._parked += 1
            else:
                continue
            leaving.append(name)
        return frozenset(leaving)
