"""The main model's own answers to prompts: how many tokens each has is what a predictor is trained on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.engine import Engine, Request
from common.models.causal_lm import KVPool, load
from common.models.causal_lm.sampling import SamplingParameters

_KV_BYTES = 64 << 20
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt, packed, and how many tokens one answer to it had, the one that ends it included."""

    prompt: bytes
    tokens: int
    temperature: float


class Answering:
    """The main model in a folder, on the CPU."""

    def __init__(self, folder: Path, kv_bytes: int = _KV_BYTES) -> None:
        """Raises: ModelLoadError: it cannot be loaded."""
        model = load(folder, "cpu", torch.float32)
        self._engine = Engine(model, KVPool.of_bytes(model.layout, kv_bytes), most_sequences=_AT_ONCE)
        self.vocabulary = model.vocabulary

    def answer(
        self, prompts: Sequence[bytes], temperatures: Sequence[float], most_tokens: int, seed: int
    ) -> list[Answered]:
        """One answer of at most ``most_tokens`` tokens to each prompt at each temperature, in this order.

        Raises:
            RequestRefused: a prompt does not fit the model.
        """
        asked = [(prompt, temperature) for prompt in prompts for temperature in temperatures]
        lengths: Counter[str] = Counter()
        for start in range(0, len(asked), _AT_ONCE):
            for number, (prompt, temperature) in enumerate(asked[start : start + _AT_ONCE], start):
                sampling = SamplingParameters(temperature=temperature, seed=seed + number)
                self._engine.add(str(number), Request(prompt, most_tokens, sampling), now_s=0.0)
            while self._engine.busy:
                lengths.update(output.sequence for output in self._engine.step(now_s=0.0))
        return [
            Answered(prompt, lengths[str(number)], temperature) for number, (prompt, temperature) in enumerate(asked)
        ]
