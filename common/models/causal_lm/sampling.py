"""From logits to tokens, for a whole batch at once.

What a request draws depends on its seed and on how many tokens it has, not on who is in the batch with it or where it
runs: each position has a random number of its own, so a sequence that moves to another instance goes on as it would
have here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.models.causal_lm.errors import WrongSamplingError
from common.models.causal_lm.filters import keep_top


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a request chooses its tokens; the defaults take the model's distribution as it is.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this much probability; 1: all.
        top_k: only so many of the likeliest tokens; 0: all.
        min_p: only tokens at least this share as likely as the likeliest; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer; 1: none.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them once for each time the answer has them.
        seed: of the random numbers.
        logprobs: with how many of the likeliest tokens each answer token's log-probability is told; None: not at all.

    Raises:
        WrongSamplingError: a value is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not valid:
                raise WrongSamplingError(f"{name} is {getattr(self, name)}, it must be {rule}")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is all that is asked for."""
        return self.temperature == 0 and not self.penalizes and self.logprobs is None


@dataclass(slots=True)
class History:
    """What a sequence has said so far, for penalties and random numbers.

    Attributes:
        prompt: the token ids of the prompt, each once.
        answer: how often the answer has each token.
        drawn: how many tokens the answer has.
    """

    prompt: frozenset[int] = frozenset()
    answer: Counter[int] = field(default_factory=Counter)
    drawn: int = 0

    def add(self, token: int) -> None:
        self.answer[token] += 1
        self.drawn += 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token.

    Attributes:
        logprob: of the token by the model's own distribution, before temperature and penalties; None: not asked for.
        top: the likeliest tokens by the same, with theirs.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, parameters: Sequence[SamplingParameters], histories: Sequence[History]) -> list[Sampled]:
    """Choose the next token of each row.

    Args:
        logits: [rows, vocabulary] float32; not changed.
        parameters, histories: one for each row; histories are not changed.
    """
    if all(one.plain for one in parameters):
        return [Sampled(token) for token in logits.argmax(-1).tolist()]
    shaped = _penalized(logits, parameters, histories)
    tokens = shaped.argmax(-1)
    drawing = [row for row, one in enumerate(parameters) if one.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        tokens[rows] = _draw(shaped[rows], [parameters[row] for row in drawing], [histories[row] for row in drawing])
    chosen: list[int] = tokens.tolist()
    return _with_logprobs(logits, chosen, parameters)


def _penalized(logits: Tensor, parameters: Sequence[SamplingParameters], histories: Sequence[History]) -> Tensor:
    """Repetition first, then presence and frequency, as OpenAI's interface and transformers define them."""
    if not any(one.penalizes for one in parameters):
        return logits
    logits = logits.clone()
    for row, (one, history) in enumerate(zip(parameters, histories, strict=True)):
        if one.repetition_penalty != 1:
            seen = torch.tensor(sorted(history.prompt | history.answer.keys()), dtype=torch.int64, device=logits.device)
            score = logits[row, seen]
            penalty = one.repetition_penalty
            logits[row, seen] = torch.where(score > 0, score / penalty, score * penalty)
        if (one.presence_penalty or one.frequency_penalty) and history.answer:
            said = torch.tensor(list(history.answer), dtype=torch.int64, device=logits.device)
            counts = torch.tensor(list(history.answer.values()), dtype=logits.dtype, device=logits.device)
            logits[row, said] -= one.presence_penalty + one.frequency_penalty * counts
    return logits


def _draw(logits: Tensor, parameters: Sequence[SamplingParameters], histories: Sequence[History]) -> Tensor:
    """[rows] tokens, by inverting each row's distribution at that row's random number."""
    temperatures = torch.tensor([one.temperature for one in parameters], device=logits.device)
    numbers = torch.from_numpy(
        _random_numbers([one.seed for one in parameters], [history.drawn for history in histories])
    ).to(logits.device)
    drawn = torch.empty(len(parameters), dtype=torch.int64, device=logits.device)
    for candidates in keep_top(
        logits / temperatures.unsqueeze(1),
        [one.top_k for one in parameters],
        [one.top_p for one in parameters],
        [one.min_p for one in parameters],
    ):
        heights = candidates.scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        # The last sum is 1 only up to rounding.
        wanted = (numbers[candidates.rows] * heights[:, -1]).unsqueeze(1)
        places = torch.searchsorted(heights, wanted, right=True).clamp_(max=heights.shape[1] - 1)
        tokens = places if candidates.tokens is None else candidates.tokens.gather(1, places)
        drawn[candidates.rows] = tokens.squeeze(1)
    return drawn


def _random_numbers(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number in [0, 1) for each seed and position, by SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        state = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
        state = _mixed(state) + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (_mixed(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _with_logprobs(logits: Tensor, chosen: Sequence[int], parameters: Sequence[SamplingParameters]) -> list[Sampled]:
    telling = [row for row, one in enumerate(parameters) if one.logprobs is not None]
    sampled = [Sampled(token) for token in chosen]
    if not telling:
        return sampled
    rows = torch.tensor(telling, device=logits.device)
    known = logits[rows].log_softmax(-1)
    own = known.gather(1, torch.tensor([chosen[row] for row in telling], device=logits.device).unsqueeze(1))
    most = min(max(parameters[row].logprobs or 0 for row in telling), logits.shape[1])
    top = known.topk(most, -1)
    told = zip(telling, own.squeeze(1).tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    for row, logprob, tokens, values in told:
        likeliest = tuple(zip(tokens, values, strict=True))[: parameters[row].logprobs]
        sampled[row] = Sampled(chosen[row], logprob, likeliest)
    return sampled
