"""Requests of a workload that turns: long prompts with short answers for a while, then the other way round, or back."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.arrivals import generator, poisson
from loadgen.bench.trace_excerpt import SmallRequest, random_tokens

_LENGTHS, _MOST_REQUESTS = 3, 100_000


@dataclass(frozen=True)
class Kind:
    """Requests with so many tokens on average, each length even between half and one and a half of that."""

    prompt_tokens: int
    answer_tokens: int

    @property
    def most_tokens(self) -> int:
        """Of a prompt with its answer."""
        return (3 * (self.prompt_tokens + self.answer_tokens)) // 2


def turning(
    kinds: Sequence[Kind], rates: Sequence[float], seconds: float, seed: int, vocabulary: int
) -> list[SmallRequest]:
    """Each kind for ``seconds``, in this order, at its rate (requests a second, Poisson); no two prompts are alike."""
    found: list[SmallRequest] = []
    for place, (kind, rate) in enumerate(zip(kinds, rates, strict=True)):
        own = seed * len(kinds) + place
        times = [float(at) for at in poisson(rate, _MOST_REQUESTS, own) if at < seconds]
        stretch = generator(own, _LENGTHS).uniform(0.5, 1.5, (len(times), 2))
        for number, at in enumerate(times):
            prompt = max(1, round(kind.prompt_tokens * stretch[number, 0]))
            answer = max(2, round(kind.answer_tokens * stretch[number, 1]))
            tokens = random_tokens((own << 20) + number, prompt, vocabulary)
            found.append(SmallRequest(place * seconds + at, f"{own}-{number}", tuple(tokens), answer))
    return found
