"""What the simulated instances are, and what carries keys and values between them.

The constants are read from the paper's figures 8 and 11 to 14 (MemServe, arXiv 2406.17565).
"""

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from common.policies.language.prefill_cost import (
    LLAMA2_13B,
    LLAMA2_13B_DECODE,
    LLAMA2_13B_LONG,
    DecodeCost,
    LinkCost,
    OperatorCost,
)
from common.policies.language.routing import Costs

# Discrete blocks: seconds a network call takes with so many communicators (figure 11a: 2,048 tokens are 10,240 calls).
CALL_S = {1: 102.3e-3 / 10_240, 2: 69.0e-3 / 10_240, 4: 38.4e-3 / 10_240, 8: 29.6e-3 / 10_240, 16: 24.2e-3 / 10_240}
# Of an aggregated block nothing is left beside its bytes: 1.68 GB in 19.3 ms (figure 11a).
LINK_BYTES_PER_S = 87e9
# What every call takes from the engine that makes it. By figure 12, some 5 % of throughput at 5,120 calls a request.
CALL_ENGINE_S = 0.3e-6
# A group of tokens whose keys and values lie together (section 4).
GROUP_TOKENS = 16


class Caching(IntEnum):
    """How far caching goes (figure 4): not at all, and PD-Caching-1 to 3. Fused instances cache from C1 on."""

    NONE = 0
    C1 = 1
    C2 = 2
    C3 = 3


class TransferMode(StrEnum):
    """How a prompt's keys and values are sent (figure 5)."""

    BY_LAYER = "by_layer"
    BY_REQUEST = "by_request"
    AGGREGATED = "aggregated"


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on its cards.

    Attributes:
        kv_tokens, dram_tokens: how many tokens' keys and values the cards and the host's memory have room for.
        block_tokens: of an indexed block.
        swap_bytes_per_s: between the host's memory and the cards, by what figure 13d loses to figure 13a.
        pass_extra_s: what a pass with prompts takes beyond computing: scheduling, sampling, answering.
        pass_tokens: prompts are computed together up to so many tokens.
    """

    name: str
    prefill: OperatorCost
    decode: DecodeCost
    kv_tokens: int
    kv_token_bytes: int
    block_tokens: int
    dram_tokens: int = 0
    swap_bytes_per_s: float = 156e9
    pass_extra_s: float = 0.025
    pass_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class Transfers:
    """How keys and values travel: ``mode``, and for discrete blocks how many communicators."""

    mode: TransferMode = TransferMode.AGGREGATED
    communicators: int = 4

    def calls(self, tokens: int, layers: int) -> int:
        """Network calls for so many tokens: one a group if aggregated, else two a group and layer."""
        groups = math.ceil(tokens / GROUP_TOKENS)
        return groups if self.mode is TransferMode.AGGREGATED else groups * 2 * layers

    def alone_s(self, tokens: int, machine: Machine) -> float:
        """How long they take on a link of their own."""
        carried_s = tokens * machine.kv_token_bytes / LINK_BYTES_PER_S
        if self.mode is TransferMode.AGGREGATED:
            return carried_s
        return max(carried_s, self.calls(tokens, machine.prefill.layers) * CALL_S[self.communicators])

    def engine_s(self, tokens: int, machine: Machine) -> float:
        """What making the calls takes from the engine."""
        return self.calls(tokens, machine.prefill.layers) * CALL_ENGINE_S


def costs_of(machine: Machine, transfers: Transfers) -> Costs:
    """What a scheduler knows of them, if it knows them exactly."""
    calls = transfers.calls(machine.block_tokens, machine.prefill.layers)
    message_s = 0.0 if transfers.mode is TransferMode.AGGREGATED else CALL_S[transfers.communicators]
    link = LinkCost(LINK_BYTES_PER_S, message_s, calls)
    return Costs(machine.prefill, machine.decode, link, machine.kv_token_bytes, machine.block_tokens)


_KV_TOKEN_BYTES = 819_200  # 40 layers, keys and values, 5,120 numbers of 2 bytes

PAPER_MACHINE = Machine("Llama2-13B on 2 H800", LLAMA2_13B, LLAMA2_13B_DECODE, 140_000, _KV_TOKEN_BYTES, 16)
# For the trace, whose prompts are longer than what figure 14 measures and whose blocks have 512 tokens.
# DRAM: a quarter of the server's 2 TB.
TRACE_MACHINE = Machine(
    "Llama2-13B on 2 H800, prompts of any length",
    LLAMA2_13B_LONG,
    LLAMA2_13B_DECODE,
    140_000,
    _KV_TOKEN_BYTES,
    512,
    dram_tokens=600_000,
)
