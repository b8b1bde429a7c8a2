"""Whether keys and values are had sooner from a cache store than by computing them. Pure: times are arguments.

It goes by what either took here so far. A cache store that fails or takes longer than computing would is left alone for
a while, so that one that is slow or away costs little.
"""

import statistics
from collections import deque

from common.language.settings import KVStore

# Asking, the answer, and the way into the pool, whatever their size.
ROUND_TRIPS_S = 0.005
# Until one was measured: what a fetch brings on one machine, over shared memory, checksums compared.
BYTES_PER_S = 400e6
# It must be sooner by so much, for it also takes time of others.
MARGIN = 1.5
# Until computing was measured, a fetch may take so long.
PATIENCE_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# Of a step with fewer tokens of prompts, the rest is most of its time.
_LEAST_COMPUTED = 32


class Worth:
    """Decides by length.

    Args:
        token_bytes: of one token's keys and values.
        least_tokens: fewer are never worth it.
        most_s: no fetch may take longer.
    """

    def __init__(self, mode: KVStore, token_bytes: int, least_tokens: int, most_s: float) -> None:
        self._mode = mode
        self._least_tokens = least_tokens
        self._most_s = most_s
        self._computing_s: deque[float] = deque(maxlen=16)
        # The quickest of the last ones: what disturbs one is not its own cost.
        self._fetching_s: deque[float] = deque([token_bytes / BYTES_PER_S], maxlen=8)
        self._pause_s = FIRST_PAUSE_S
        self._paused_until_s = 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts."""
        if tokens >= _LEAST_COMPUTED:
            self._computing_s.append(seconds / tokens)

    def fetched(self, tokens: int, seconds: float) -> None:
        """A fetch brought so many."""
        self._fetching_s.append(max(0.0, seconds - ROUND_TRIPS_S) / tokens)
        self._pause_s = FIRST_PAUSE_S

    def failed(self, now_s: float) -> None:
        """One brought nothing in time: there is a pause, after each failure in a row a longer one."""
        self._paused_until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def pays(self, tokens: int, now_s: float) -> bool:
        """Whether so many tokens' keys and values are worth a fetch."""
        if self._mode is KVStore.OFF or tokens < self._least_tokens:
            return False
        if self._mode is KVStore.ALWAYS:
            return True
        computing_s = self._computing(tokens)
        fetching_s = ROUND_TRIPS_S + tokens * min(self._fetching_s)
        return now_s >= self._paused_until_s and (computing_s is None or MARGIN * fetching_s < computing_s)

    def patience_s(self, tokens: int) -> float:
        """How long a fetch of so many may take: as long as computing them would."""
        if self._mode is KVStore.ALWAYS:
            return self._most_s
        computing_s = self._computing(tokens)
        return min(PATIENCE_S if computing_s is None else computing_s, self._most_s)

    def _computing(self, tokens: int) -> float | None:
        return tokens * statistics.median(self._computing_s) if self._computing_s else None
