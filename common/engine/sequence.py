"""One sequence that an engine computes: its tokens, its blocks, and its answer as text."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from common.engine.blocks import SequenceBlocks
from common.engine.request import Finish, Output, Request
from common.mempool.address import TOKEN_BYTES
from common.messages.chat import pack_tokens, tokens_in, unpack_tokens
from common.models.causal_lm.sampling import History, Sampled
from common.models.causal_lm.text import Detokenizer, StopStrings


@dataclass(slots=True)
class Computed:
    """One sequence.

    Attributes:
        tokens: packed, the prompt's and the answer's so far.
        keeps: whether others may have its keys and values too.
        computed: of so many tokens there are any.
        prefilled: whether all of them were computed that it had when it came in.
        cached: how many of those were not computed but found, when it first came in; None: it never has.
        parked: whether it stands still here, and somebody goes on from its blocks.
        expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.
    """

    request: Request
    tokens: bytearray
    history: History
    detokenizer: Detokenizer | None
    stops: StopStrings
    blocks: SequenceBlocks
    keeps: bool
    computed: int = 0
    prefilled: bool = False
    cached: int | None = None
    parked: bool = False
    expected_tokens: int = 0

    @classmethod
    def of(
        cls, request: Request, tokenizer: PreTrainedTokenizerFast | None, blocks: SequenceBlocks, keeps: bool
    ) -> "Computed":
        answered = unpack_tokens(request.answered)
        repeats = request.sampling.repetition_penalty != 1
        prompt = frozenset(unpack_tokens(request.prompt)) if repeats else frozenset[int]()
        return cls(
            request,
            bytearray(request.prompt + request.answered),
            History(prompt, Counter(answered), len(answered)),
            Detokenizer(tokenizer) if tokenizer is not None else None,
            StopStrings(request.stops),
            blocks,
            keeps,
        )

    @property
    def decoding(self) -> bool:
        """Whether all of its tokens but the last are computed, so that one token is computed a step."""
        return self.prefilled and self.computed == tokens_in(self.tokens) - 1

    @property
    def known(self) -> bytes:
        """The tokens whose keys and values others may have."""
        return self.span(0, self.computed) if self.keeps else b""

    def span(self, start: int, end: int) -> bytes:
        """Tokens ``start`` to ``end``, packed."""
        return bytes(self.tokens[TOKEN_BYTES * start : TOKEN_BYTES * end])

    def take(self, name: str, sampled: Sampled, end_tokens: Collection[int]) -> Output:
        """Note a new token, and see whether it is the last. ``end_tokens``: the model's own."""
        token = sampled.token
        self.tokens += pack_tokens((token,))
        self.history.add(token)
        finish: Finish | None = None
        text = ""
        if token in self.request.stop_tokens or (token in end_tokens and not self.request.ignore_end):
            finish = Finish.STOP
        elif self.detokenizer is not None:
            text = self.stops.add(self.detokenizer.add(token))
        if self.stops.stopped is not None:
            finish = Finish.STOP
        elif finish is None and self.history.drawn == self.request.most_tokens:
            finish = Finish.LENGTH
        if finish is not None and self.stops.stopped is None and self.detokenizer is not None:
            text += self.stops.add(self.detokenizer.finish()) + self.stops.finish()
        cached, self.cached = self.cached, 0
        return Output(name, sampled, text, finish, cached or 0)
