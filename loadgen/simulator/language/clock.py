"""Virtual time: a heap of what is to happen. Of two things at one moment, the one that was planned first goes first."""

import heapq
from collections.abc import Callable


class Clock:
    """Time moves only from one planned thing to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.happened = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Have ``what`` called at ``time_s``.

        Raises:
            ValueError: that is past.
        """
        if time_s < self.now_s:
            raise ValueError(f"{time_s} s is past: it is {self.now_s} s")
        self._planned += 1
        heapq.heappush(self._heap, (time_s, self._planned, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, what)

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._heap:
            self.now_s, _, what = heapq.heappop(self._heap)
            self.happened += 1
            what()
