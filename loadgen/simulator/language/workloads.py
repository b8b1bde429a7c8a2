"""The paper's classes of requests (TetriInfer, section 5.1), and traces of production.

Lengths follow the quantiles of ShareGPT that the paper's figure 1 shows, within the bounds of the class; prompts of the
light classes have the means that follow from the number of chunks in its figures (brief, section 10.1). OPT's context
bounds prompt and answer together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import FloatArray, burst, generator, poisson
from loadgen.simulator.language.requests import ChatRequest

CONTEXT = 2048
HEAVY_PROMPT, HEAVY_ANSWER = 512, 128

# Shares of the requests, and up to how many tokens they have.
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_PROMPT_TOKENS = (4, 30, 210, 590, 1100, 2000, CONTEXT)
_ANSWER_TOKENS = (2, 20, 120, 320, 610, 1000, CONTEXT)


@dataclass(frozen=True, slots=True)
class RequestClass:
    """One of the paper's workloads.

    Attributes:
        requests: in the paper's burst.
        prompt, answer: the least and the most tokens of each.
        prompt_mean, answer_mean: lengths, whose shape is ShareGPT's, are scaled to these means.
    """

    name: str
    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    prompt_mean: float
    answer_mean: float


LPLD = RequestClass("LPLD", 128, (4, HEAVY_PROMPT), (2, HEAVY_ANSWER), 210, 42)
LPHD = RequestClass("LPHD", 128, (4, HEAVY_PROMPT), (HEAVY_ANSWER + 1, CONTEXT), 80, 470)
HPLD = RequestClass("HPLD", 32, (HEAVY_PROMPT + 1, CONTEXT), (2, HEAVY_ANSWER), 900, 40)
HPHD = RequestClass("HPHD", 32, (HEAVY_PROMPT + 1, CONTEXT), (HEAVY_ANSWER + 1, CONTEXT), 900, 400)
MIXED = RequestClass("Mixed", 128, (4, 1024), (2, CONTEXT), 290, 250)
CLASSES = {one.name: one for one in (LPLD, LPHD, HPLD, HPHD, MIXED)}


def class_requests(
    of: RequestClass, seed: int, count: int | None = None, rate: float | None = None
) -> list[ChatRequest]:
    """A class's requests, all at once or at ``rate`` a second; a seed's are the same at every rate."""
    number = count or of.requests
    draws = generator(seed, 10).random((2, number))
    prompts = _with_mean(_lengths(draws[0], _PROMPT_TOKENS, of.prompt), of.prompt_mean, of.prompt)
    answers = _with_mean(_lengths(draws[1], _ANSWER_TOKENS, of.answer), of.answer_mean, of.answer)
    arrivals = burst(number) if rate is None else poisson(rate, number, seed)
    return _requests(arrivals, prompts, answers)


def _lengths(draws: FloatArray, tokens: Sequence[int], bounds: tuple[int, int]) -> FloatArray:
    """Lengths of the distribution with these quantiles, given that they are within the bounds; logarithmic between."""
    logs = np.log(np.asarray(tokens, dtype=np.float64))
    low, high = np.interp(np.log(np.asarray(bounds, dtype=np.float64)), logs, np.asarray(_SHARES))
    return np.asarray(np.exp(np.interp(low + draws * (high - low), np.asarray(_SHARES), logs)), dtype=np.float64)


def _with_mean(lengths: FloatArray, mean: float, bounds: tuple[int, int]) -> FloatArray:
    """Scaled until their mean is right although they stay within the bounds."""
    scaled = lengths
    for _ in range(30):
        scaled = np.clip(scaled * (mean / scaled.mean()), *bounds)
    return scaled


def _requests(arrivals: FloatArray, prompts: NDArray[np.float64], answers: NDArray[np.float64]) -> list[ChatRequest]:
    requests = []
    for number, (arrival_s, prompt, answer) in enumerate(zip(arrivals.tolist(), prompts, answers, strict=True)):
        prompt_tokens = max(1, round(float(prompt)))
        answer_tokens = max(1, min(round(float(answer)), CONTEXT - prompt_tokens))
        requests.append(ChatRequest(f"chat-{number:06d}", arrival_s, prompt_tokens, answer_tokens))
    return requests


def faster(requests: Sequence[ChatRequest], times: float) -> list[ChatRequest]:
    """The same requests, so many times as fast."""
    return [replace(request, arrival_s=request.arrival_s / times) for request in requests]
