"""Whether one more sequence is let into the batch, and who must leave it (TetriInfer, section 3.4).

A sequence needs blocks for the tokens it has, and one more for every so many that it generates. Whoever is let in too
early is thrown out later, and what was computed for it is computed again. How many tokens a sequence will come to have
is a prediction; the paper gives the rules in words, the arithmetic is ours.

    greedy            let in while there is room for the tokens it has (vLLM's rule)
    reserve_static    while there is room now for all tokens it is predicted to come to have
    reserve_dynamic   while all of the batch will have room when the sequence that is predicted to end first ends
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class BatchedSequence(Protocol):
    """What is known of a sequence, in tokens.

    Attributes:
        order: its place in the order of arrival.
        tokens: how many it has.
        expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.
    """

    name: str
    order: int
    tokens: int
    expected_tokens: int


class AdmissionRule(StrEnum):
    GREEDY = "greedy"
    RESERVE_STATIC = "reserve_static"
    RESERVE_DYNAMIC = "reserve_dynamic"


class VictimRule(StrEnum):
    """Who leaves where there is no room: the one that came last, or the one with the most tokens yet to come."""

    LATEST = "latest"
    LONGEST_REMAINING = "longest_remaining"


@dataclass(frozen=True, slots=True)
class DecodeAdmission:
    """The rules of one instance.

    Attributes:
        past_tokens: how many more are expected of a sequence that has outlived its prediction.
    """

    rule: AdmissionRule = AdmissionRule.GREEDY
    victim_rule: VictimRule = VictimRule.LATEST
    past_tokens: int = 1

    @property
    def goes_by_predictions(self) -> bool:
        """Whether anything depends on ``expected_tokens``."""
        return self.rule is not AdmissionRule.GREEDY or self.victim_rule is VictimRule.LONGEST_REMAINING

    def refusal(
        self, candidate: BatchedSequence, batch: Collection[BatchedSequence], free_blocks: int, block_tokens: int
    ) -> str | None:
        """Why the candidate must wait; None: it may come in.

        Args:
            batch: who holds blocks.
            free_blocks: how many could be given out now.
            block_tokens: how many tokens one holds.
        """
        need = _blocks(candidate.tokens, block_tokens)
        if need > free_blocks:
            return f"{need} blocks for its tokens, {free_blocks} are free"
        if self.rule is AdmissionRule.RESERVE_STATIC:
            need = _blocks(candidate.tokens + self.remaining(candidate), block_tokens)
            # An empty instance could never take in one whose prediction is beyond all it has.
            if need > free_blocks and batch:
                return f"{need} blocks for the tokens predicted, {free_blocks} are free"
        if self.rule is AdmissionRule.RESERVE_DYNAMIC and batch:
            return self._refused_later(candidate, batch, free_blocks, block_tokens)
        return None

    def victim(self, batch: Collection[BatchedSequence]) -> tuple[str, str]:
        """The name of the one that leaves first, and why it does; of equals, who came last."""
        if self.victim_rule is VictimRule.LATEST:
            return max(batch, key=lambda one: one.order).name, "it came last"
        leaving = max(batch, key=lambda one: (self.remaining(one), one.order))
        return leaving.name, f"it has most yet to come, {self.remaining(leaving)} tokens"

    def remaining(self, sequence: BatchedSequence) -> int:
        """How many tokens are yet to come, as far as anybody knows."""
        return max(self.past_tokens, sequence.expected_tokens - sequence.tokens)

    def _refused_later(
        self, candidate: BatchedSequence, batch: Collection[BatchedSequence], free_blocks: int, block_tokens: int
    ) -> str | None:
        first = min(batch, key=self.remaining)
        until = self.remaining(first)
        held = later = 0
        for one in batch:
            held += _blocks(one.tokens, block_tokens)
            if one is not first:
                later += _blocks(one.tokens + min(until, self.remaining(one)), block_tokens)
        later += _blocks(candidate.tokens + min(until, self.remaining(candidate)), block_tokens)
        if later > held + free_blocks:
            return f"{later} blocks in {until} tokens, when the first ends, of {held + free_blocks}"
        return None


def _blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)
