"""How many instances prefill and decode want, measured, and how many sequences there are under a split of them.

Everything is in instances: a demand of 1.5 for prefill keeps one and a half of them computing all the time. It is what
comes, in tokens a second, times the seconds that a token takes, which is seen too: time used by tokens done. A prefill
instance is used while it computes. One that decodes n sequences at once is used to n / (n + batch), as a step takes
``batch + n`` times what a sequence adds to it: so its tokens a second grow, and that is its share of what they can grow
to. Neither measure depends on how the instances are split, and that is why a flip follows from them and not from
queues: prompts also wait where decode instances are full and prompts that are done cannot leave.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from common.policies.language.prefill_cost import DecodeCost

# Of OPT-13B on two V100s with contexts of 1,300 tokens; of what nobody has profiled.
BATCH = 12.0
# In tokens, for costs that have been measured.
_CONTEXT = 1000
# What a prefill instance can be used to, so that what waits does not grow out of all proportion.
_MOST_PREFILL = 0.9
_PACE_S = 60.0


def doubling_batch(cost: DecodeCost) -> float:
    """How many sequences at once make a step twice as long as one with none; a guess where a step costs nothing."""
    sequence_s = cost.sequence_s + _CONTEXT * cost.context_token_s
    return max(1.0, cost.floor_s / sequence_s) if cost.floor_s and sequence_s else BATCH


class Rate:
    """How much of something that only grows comes a second, averaged over ``window_s``."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._before: float | None = None
        self._come = self._passed_s = 0.0

    def saw(self, total: float, passed_s: float) -> None:
        """So much has come in all, the last of it within ``passed_s``."""
        if self._before is not None and passed_s > 0:
            keep = math.exp(-passed_s / self._window_s)
            # A scheduler's counts may begin anew.
            self._come = keep * self._come + max(0.0, total - self._before)
            self._passed_s = keep * self._passed_s + passed_s
        self._before = total

    @property
    def per_s(self) -> float:
        return self._come / self._passed_s if self._passed_s else 0.0


class Pace:
    """Seconds of an instance for each token, over the last minute of work; more and more while none is done."""

    def __init__(self) -> None:
        self._used_s = self._tokens = 0.0
        self._before: float | None = None

    def saw(self, used_s: float, tokens: float, weight: float = 1.0) -> None:
        """Within so many seconds of an instance so many tokens were done."""
        keep = math.exp(-weight * used_s / _PACE_S)
        self._used_s = keep * self._used_s + weight * used_s
        self._tokens = keep * self._tokens + weight * tokens

    def saw_total(self, used_s: float, total: float) -> None:
        """The same, given how many there were since the beginning."""
        before, self._before = self._before, total
        self.saw(used_s, total - before if before is not None else 0.0)

    @property
    def token_s(self) -> float:
        return self._used_s / max(1.0, self._tokens)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is wanted.

    Attributes:
        prefill, decode: instances.
        batch: how many sequences make a step twice as long as one with none.
        room: how many an instance has memory for.
    """

    prefill: float
    decode: float
    batch: float
    room: float


def crowd(demand: Demand, prefill: int, decode: int) -> float:
    """How many sequences there are at once, on average, with so many instances of each role.

    By Little's law that is what a sequence takes in all, times how many come. Those at prefill: by Sakasegawa's
    approximation of a queue with several servers; at decode: n on each, where n / (n + batch) is what each is used to.
    What is wanted beyond what a role can give is what would be there were there room, and beside it counts by how much
    the narrower of the two roles falls short: all sequences go through both.
    """
    most_decode = demand.room / (demand.room + demand.batch)
    servers = math.sqrt(2 * (prefill + 1))
    there = demand.prefill + _beyond(lambda used: used**servers / (1 - used), demand.prefill / prefill, _MOST_PREFILL)
    there += decode * _beyond(lambda used: demand.batch * used / (1 - used), demand.decode / decode, most_decode)
    short = max(demand.prefill / (_MOST_PREFILL * prefill), demand.decode / (most_decode * decode)) - 1
    return there + max(0.0, short) * demand.room * (prefill + decode)


def _beyond(curve: Callable[[float], float], used: float, most: float) -> float:
    """The curve up to ``most``, and its tangent from there: the curve itself ends at 1."""
    if used <= most:
        return curve(used)
    step = 1e-3
    return curve(most) + (used - most) * (curve(most) - curve(most - step)) / step
