"""The paper's classes of requests (TetriInfer, section 5.1), and traces of production.

Lengths follow the quantiles of ShareGPT that the paper's figure 1 shows, within the bounds of the class; prompts of the
light classes have the means that follow from the number of chunks in its figures 11 to 15. OPT's context
bounds prompt and answer together.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import FloatArray, burst, generator, poisson
from loadgen.simulator.language.requests import ChatRequest

CONTEXT = 2048
_AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
HEAVY_PROMPT, HEAVY_ANSWER = 512, 128

# Shares of the requests, and up to how many tokens they have.
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_PROMPT_TOKENS = (4, 30, 210, 590, 1100, 2000, CONTEXT)
_ANSWER_TOKENS = (2, 20, 120, 320, 610, 1000, CONTEXT)


class WrongTrace(ValueError):
    """A trace that cannot be read; the message says where it goes wrong."""


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
HPLD = RequestClass("HPLD", 32, (HEAVY_PROMPT + 1, CONTEXT), (2, HEAVY_ANSWER), 900, 34)
HPHD = RequestClass("HPHD", 32, (HEAVY_PROMPT + 1, CONTEXT), (HEAVY_ANSWER + 1, CONTEXT), 900, 420)
MIXED = RequestClass("Mixed", 128, (4, 1024), (2, CONTEXT), 290, 250)
# What the paper's tests of decode instances go by: its figure 1, unscaled.
SHAREGPT = RequestClass("ShareGPT", 256, (4, 1600), (2, CONTEXT), 430, 224)
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


def turns(seed: int, conversations: int, rate: float, length: int = 4, apart_s: float = 30.0) -> list[ChatRequest]:
    """Conversations that begin ``rate`` times a second; each turn's prompt is all that was said and a new question.

    The first prompt has 200 to 800 tokens, a question 20 to 100 and an answer 50 to 250; turns are ``apart_s`` apart.
    """
    chance = generator(seed, 12)
    requests = []
    for number, start_s in enumerate(poisson(rate, conversations, seed).tolist()):
        said = 0
        for turn in range(length):
            prompt = said + int(chance.integers(200, 801) if turn == 0 else chance.integers(20, 101))
            answer = int(chance.integers(50, 251))
            said = prompt + answer
            ids = range(number * 1000, number * 1000 + said // 16)
            asked = prompt // 16
            arrival_s = start_s + turn * apart_s
            name = f"chat-{number:05d}-{turn}"
            requests.append(ChatRequest(name, arrival_s, prompt, answer, tuple(ids[:asked]), tuple(ids[asked:])))
    return sorted(requests, key=lambda request: request.arrival_s)


def dispatch_requests(instances: int, seed: int) -> list[ChatRequest]:
    """For figure 19: 32 heavy decodes in all and light ones up to 32 for each instance, in any order.

    Light ones have 20 to 100 tokens (section 2.2.3). That all 32 heavy ones on one instance take the paper 13.9 s makes
    them about 260 tokens long.
    """
    chance = generator(seed, 11)
    answers = [260] * 32 + chance.integers(20, 101, 32 * (instances - 1)).tolist()
    return [
        ChatRequest(f"chat-{number:06d}", 0.0, 18, answers[place])
        for number, place in enumerate(chance.permutation(len(answers)).tolist())
    ]


def turning(seed: int, phase_s: float = 240.0) -> list[ChatRequest]:
    """A load that turns: light prompts with long answers, then heavy prompts with short ones, each for so long."""
    first = [one for one in class_requests(LPHD, seed, 1000, 2.0) if one.arrival_s < phase_s]
    second = [one for one in class_requests(HPLD, seed, 3000, 7.0) if one.arrival_s < phase_s]
    late = [replace(one, name=f"late-{one.name}", arrival_s=one.arrival_s + phase_s) for one in second]
    return [*first, *late]


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


def azure_requests(text: str) -> list[ChatRequest]:
    """Azure's trace of a conversation service: ``TIMESTAMP,ContextTokens,GeneratedTokens``, a request a line.

    Raises:
        WrongTrace: a line is not of this form, or time goes backwards.
    """
    rows = list(csv.reader(text.splitlines()))
    if not rows or rows[0] != _AZURE_COLUMNS:
        raise WrongTrace(f"the first line is not {','.join(_AZURE_COLUMNS)}")
    requests: list[ChatRequest] = []
    start: datetime | None = None
    for number, row in enumerate(rows[1:]):
        try:
            when, prompt, answer = row
            # Seven decimals; Python's datetime knows six.
            came = datetime.strptime(when[:26], "%Y-%m-%d %H:%M:%S.%f")
            tokens = int(prompt), int(answer)
        except ValueError:
            raise WrongTrace(f"line {number + 2}: {','.join(row)!r} is not a time and two numbers of tokens") from None
        start = start or came
        arrival_s = (came - start).total_seconds()
        if min(tokens) < 1 or (requests and arrival_s < requests[-1].arrival_s):
            raise WrongTrace(f"line {number + 2}: no tokens, or earlier than the line before")
        requests.append(ChatRequest(f"chat-{number:06d}", arrival_s, *tokens))
    if not requests:
        raise WrongTrace("there is no request in it")
    return requests
