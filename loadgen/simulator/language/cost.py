"""How long an engine's step takes: the model of the cost, and the published machines it is fitted to."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one forward pass computes.

    Attributes:
        prompt_tokens: computed for prompts, padding included.
        attended_tokens: summed over the prompts' tokens, how many each of them looks back at.
        decoding: sequences of which one token is computed.
        context_tokens: whose keys and values those sequences read, all together.
    """

    prompt_tokens: int
    attended_tokens: int
    decoding: int
    context_tokens: int


class EngineCost(Protocol):
    """One engine's times."""

    def step_s(self, work: StepWork) -> float:
        """Of one forward pass, in seconds."""


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """Straight lines through measured points (TetriInfer's figures 2 to 5).

    A pass with n prompt tokens takes ``max(prompt_floor_s + n * prompt_token_s, n * saturated_token_s)``: up to the
    point of saturation each token costs little beside what the pass costs anyway, and beyond it throughput is flat. A
    pass without prompts takes ``decode_floor_s``. Each sequence that decodes adds its share and what it reads.

    In mixed passes the keys and values that are read count too. At the contexts of figure 4 that is 4 ms of 39.
    """

    prompt_floor_s: float
    prompt_token_s: float
    saturated_token_s: float
    decode_floor_s: float
    sequence_s: float
    context_token_s: float

    def prefill_s(self, tokens: int) -> float:
        """A pass with ``tokens`` of prompts and nothing else."""
        return max(self.prompt_floor_s + self.prompt_token_s * tokens, self.saturated_token_s * tokens)

    def step_s(self, work: StepWork) -> float:
        base_s = self.prefill_s(work.prompt_tokens) if work.prompt_tokens else self.decode_floor_s
        return base_s + self.sequence_s * work.decoding + self.context_token_s * work.context_tokens


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on its accelerators: what a simulated instance is.

    Attributes:
        kv_tokens: how many tokens' keys and values it has room for.
        kv_token_bytes: of one token, all layers.
    """

    name: str
    cost: EngineCost
    kv_tokens: int
    kv_token_bytes: int
    block_tokens: int = 16

    @property
    def blocks(self) -> int:
        return self.kv_tokens // self.block_tokens

    @property
    def block_bytes(self) -> int:
        return self.kv_token_bytes * self.block_tokens


COST = MeasuredEngine(
    prompt_floor_s=0.030,
    prompt_token_s=0.000222,
    saturated_token_s=0.00028,
    decode_floor_s=0.025,
    sequence_s=0.00054,
    context_token_s=0.0000011,
)
OPT_13B_2_V100 = Machine(
    name="OPT-13B on 2 V100",
    cost=COST,
    kv_tokens=39_000,
    kv_token_bytes=819_200,  # 40 layers, keys and values, 5120 numbers of 2 bytes
)
