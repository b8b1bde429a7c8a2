"""What a prefill costs before it is run: MemServe's operator-level model (arXiv 2406.17565, section 5.3).

``exec(x, y)`` is the sum of its operators' times. Matrix products are bound by compute and go in whole waves of thread
blocks over the card's multiprocessors. Attention is bound by memory and fitted. The rest is a fixed time by layer.

Departures: only tokens that are not cached go through the products. Attention goes by the pairs of tokens that causal
attention computes, those with cached tokens apart, in the place of the paper's ``a x^2 y + b x^2``, which is linear in
what is cached. A whole pass takes no less than ``floor_s``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol


class PrefillCost(Protocol):
    """``exec(x, y)`` of the paper."""

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds to prefill a prompt of which the first tokens are cached."""


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """One model on one kind of instance.

    Attributes:
        layers: how many.
        products: (inputs, outputs) of every matrix product of a layer.
        multiprocessors: of one card.
        tile: rows and columns of the result that a thread block makes.
        flops: that the card reaches in products, a second.
        attention_pair_s, cached_pair_s, token_s: by pair of computed tokens, by pair of a computed token with a cached
            one, and by computed token, of one layer.
        layer_s: of what is neither, of one layer; and of launching it.
        parallelism: over how many cards a layer is spread.
        floor_s: the least that a pass takes.
    """

    layers: int
    products: tuple[tuple[int, int], ...]
    multiprocessors: int
    tile: int
    flops: float
    attention_pair_s: float
    cached_pair_s: float
    token_s: float
    layer_s: float
    parallelism: int
    floor_s: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Of one prompt of which the first tokens are cached."""
        return self.batch_s([(prompt_tokens, cached_tokens)])

    def batch_s(self, prompts: Sequence[tuple[int, int]]) -> float:
        """Of prompts in one pass, each given as its tokens and how many of them are cached.

        Departure: the paper sums lengths and ratios over the batch. But a prompt's tokens look back at their own only.
        """
        computed_tokens = 0
        attention_s = 0.0
        for tokens, cached in prompts:
            computed = tokens - cached
            computed_tokens += computed
            attention_s += computed * (self.attention_pair_s * computed / 2 + self.cached_pair_s * cached)
        layer_s = self._products_s(computed_tokens) + attention_s + self.token_s * computed_tokens + self.layer_s
        return max(self.floor_s, self.layers * layer_s / self.parallelism)

    def _products_s(self, tokens: int) -> float:
        """``eta * T_full`` of the paper: whole waves, the last one taken for a full one."""
        rows = math.ceil(tokens / self.tile)
        total = 0.0
        for inputs, outputs in self.products:
            waves = math.ceil(rows * math.ceil(outputs / self.tile) / self.multiprocessors)
            total += waves * inputs
        return total * 2 * self.tile * self.tile * self.multiprocessors / self.flops


@dataclass(frozen=True, slots=True)
class RateCost:
    """At one rate, whatever is cached: of a machine whose operators nobody has fitted."""

    tokens_per_s: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Of one prompt of which the first tokens are cached."""
        return (prompt_tokens - cached_tokens) / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class ScaledCost:
    """So many times what ``cost`` says."""

    cost: PrefillCost
    factor: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Of one prompt of which the first tokens are cached."""
        return self.factor * self.cost.exec_s(prompt_tokens, cached_tokens)


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """One step of a batch: ``floor_s``, and something for each sequence and for each token that it looks back at."""

    floor_s: float
    sequence_s: float
    context_token_s: float

    def step_s(self, sequences: int, context_tokens: float) -> float:
        return self.floor_s + self.sequence_s * sequences + self.context_token_s * context_tokens


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What carries keys and values between instances, when nobody else uses it. ``once_s``: for each transfer."""

    bytes_per_s: float
    message_s: float
    messages_per_block: int = 1
    once_s: float = 0.0

    def send_s(self, size_bytes: float, blocks: int) -> float:
        return self.once_s + size_bytes / self.bytes_per_s + self.message_s * self.messages_per_block * blocks


_HIDDEN, _INNER = 5120, 13_824

# Llama2-13B on two H800, fitted to MemServe's figure 14a, which ends at 4,000 tokens: 5 % from it on average.
LLAMA2_13B = OperatorCost(
    layers=40,
    products=((_HIDDEN, 3 * _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 2 * _INNER), (_INNER, _HIDDEN)),
    multiprocessors=132,
    tile=128,
    flops=9.8e14,
    attention_pair_s=0.187e-9,
    cached_pair_s=0.429e-9,
    token_s=0.145e-6,
    layer_s=0.298e-3,
    parallelism=2,
    floor_s=0.017,
)
# The same for prompts of any length: attention by a parabola through that figure, 0.046 ms by (1,000 tokens) squared.
# Beyond its measured range the fit above would take attention for several times what the card computes.
LLAMA2_13B_LONG = replace(LLAMA2_13B, attention_pair_s=0.092e-9, cached_pair_s=0.092e-9, token_s=0.3e-6)
# Time per output token of figure 8: 11 ms alone. What a batch adds goes by the tokens that it looks back at: by the law
# of Little 62 chats of ShareGPT (1,100 tokens) make it 43 ms, and 65 of ReAct (2,300 tokens) 79 ms.
LLAMA2_13B_DECODE = DecodeCost(floor_s=0.011, sequence_s=0.00005, context_token_s=0.45e-6)
