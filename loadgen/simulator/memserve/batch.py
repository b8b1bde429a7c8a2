"""A decode batch, many steps at once: between two changes of the batch its steps follow from each other.

Step k of a run (from 0) takes ``step_s(sequences, context + k * sequences)``. So m steps take a sum that has a closed
form, and an hour of decoding is as many events as there are arrivals and ends, not as there are tokens.
"""

import heapq
import math
from dataclasses import dataclass, field

from common.policies.language.prefill_cost import DecodeCost


@dataclass(slots=True)
class Batch:
    """Sequences that decode together. ``names`` ends when its last token is there."""

    cost: DecodeCost
    steps: int = 0
    context_tokens: int = 0
    _ends: list[tuple[int, str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._ends)

    def join(self, name: str, context_tokens: int, tokens: int) -> None:
        """A sequence with so much behind it has so many tokens to come (1 or more)."""
        heapq.heappush(self._ends, (self.steps + tokens, name, context_tokens + tokens))
        self.context_tokens += context_tokens

    @property
    def steps_to_first_end(self) -> int:
        return self._ends[0][0] - self.steps

    def span_s(self, steps: int) -> float:
        """How long the next steps take together."""
        count = len(self._ends)
        one_s = self.cost.step_s(count, self.context_tokens)
        return steps * one_s + self.cost.context_token_s * count * steps * (steps - 1) / 2

    def steps_within(self, span_s: float) -> int:
        """The fewest steps, at least one, that take ``span_s`` or longer."""
        count = len(self._ends)
        half = self.cost.context_token_s * count / 2
        one_s = self.cost.step_s(count, self.context_tokens) - half
        steps = max(1, math.floor(2 * span_s / (one_s + math.sqrt(one_s * one_s + 4 * half * span_s))))
        while self.span_s(steps) < span_s:
            steps += 1
        return steps

    def advance(self, steps: int) -> list[str]:
        """So many steps are done; who has ended with the last of them."""
        self.steps += steps
        self.context_tokens += steps * len(self._ends)
        ended = []
        while self._ends and self._ends[0][0] <= self.steps:
            _, name, context_tokens = heapq.heappop(self._ends)
            self.context_tokens -= context_tokens
            ended.append(name)
        return ended
