"""Predictors for experiments, and what one that runs beside the model costs it.

``Oracle`` knows the answer, ``NoisyOracle`` is right as often as the paper's classifier, and the histogram is the one
that takes a trained predictor's place (``common.policies.language.length_prediction``).
"""

from dataclasses import dataclass
from typing import Protocol

from common.policies.language.length_prediction import LengthBuckets, LengthHistogram, LengthRange, prompt_class
from loadgen.arrivals import generator
from loadgen.simulator.language.requests import ChatRequest

# How often TetriInfer's classifier names the right range, by its width in tokens (section 5.2.2).
PAPER_ACCURACY = {100: 0.589, 200: 0.749, 400: 0.85}
_STREAM = 20


class Predictor(Protocol):
    """Says how long an answer will be, and hears how long it was."""

    def predict(self, request: ChatRequest) -> LengthRange: ...

    def observe(self, request: ChatRequest) -> None: ...


class Oracle:
    """Knows every answer's bucket; ``exact``: even its length."""

    def __init__(self, buckets: LengthBuckets, exact: bool = False) -> None:
        self._buckets = buckets
        self._exact = exact

    def predict(self, request: ChatRequest) -> LengthRange:
        if self._exact:
            return LengthRange(request.answer_tokens, request.answer_tokens + 1, "oracle of lengths")
        return self._buckets.range(self._buckets.bucket(request.answer_tokens), "oracle of buckets")

    def observe(self, request: ChatRequest) -> None:
        pass


class NoisyOracle:
    """Names the right bucket with probability ``accuracy``, else one ``distance`` away, up or down alike.

    The distance is geometric: 1 half of the time, 2 a quarter, and so on. The paper gives no distribution of errors. A
    request's prediction is the same under every policy: its draws are of the seed and its place in the workload.
    """

    def __init__(self, buckets: LengthBuckets, accuracy: float, seed: int) -> None:
        self._buckets = buckets
        self._accuracy = accuracy
        self._generator = generator(seed, _STREAM)
        self._draws: dict[str, tuple[float, float, int]] = {}

    def prepare(self, names: list[str]) -> None:
        """Draw for these, in their order."""
        for name in names:
            right, up, distance = self._generator.random(), self._generator.random(), self._generator.geometric(0.5)
            self._draws[name] = (float(right), float(up), int(distance))

    def predict(self, request: ChatRequest) -> LengthRange:
        right, up, distance = self._draws[request.name]
        bucket = self._buckets.bucket(request.answer_tokens)
        if right >= self._accuracy:
            last = self._buckets.buckets - 1
            # At the ends there is one side only.
            bucket = bucket + distance if (up < 0.5 and bucket < last) or bucket == 0 else bucket - distance
        return self._buckets.range(bucket, f"noisy oracle, right in {self._accuracy:.1%}")

    def observe(self, request: ChatRequest) -> None:
        pass


class Histogram:
    """Learns from the answers that have ended."""

    def __init__(self, buckets: LengthBuckets, unknown: int = 256) -> None:
        self._histogram = LengthHistogram(buckets, unknown)

    def predict(self, request: ChatRequest) -> LengthRange:
        return self._histogram.predict(prompt_class(request.prompt_tokens))

    def observe(self, request: ChatRequest) -> None:
        self._histogram.observe(prompt_class(request.prompt_tokens), request.answer_tokens)


@dataclass(slots=True)
class PredictorTax:
    """A predictor that shares the accelerator (the paper's parallel mode): while it runs, the model is slower.

    It takes the prompts that have come one after the other, ahead of the model: in the paper's bursts chunks take 1.65
    times as long for the first two or three seconds and then what they always take (figures 11 to 15). How long in all
    follows from by how much prefill ends later than its chunks alone would: 0.09 ms a token fits all five classes.

    Attributes:
        token_s: for one token of a prompt, beside the model.
        slower: how many times as long the model's steps take meanwhile.
    """

    token_s: float = 0.00009
    slower: float = 1.65
    busy_until_s: float = 0.0

    def predict(self, prompt_tokens: int, now_s: float) -> float:
        """A prompt has come; when its prediction is there."""
        self.busy_until_s = max(now_s, self.busy_until_s) + self.token_s * prompt_tokens
        return self.busy_until_s

    def slowed(self, start_s: float, takes_s: float) -> float:
        """How long a step takes that begins then and would take so long alone."""
        beside_s = max(0.0, self.busy_until_s - start_s)
        if takes_s * self.slower <= beside_s:
            return takes_s * self.slower
        return beside_s + takes_s - beside_s / self.slower
