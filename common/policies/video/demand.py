"""What the arrivals so far say of the load: how fast they come, and how late first come, first served would be."""

import math
from bisect import bisect_left, insort
from collections import deque


class ArrivalRate:
    """Videos a second, and GPU-seconds of work a second, as they came of late: an exponentially fading average."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._began_s: float | None = None
        self._last_s = 0.0
        self._videos = 0.0
        self._work = 0.0
        self._squares = 0.0

    def arrived(self, work_s: float, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._last_s = now_s
        fade = math.exp((self._last_s - now_s) / self._memory_s)
        self._last_s = now_s
        self._videos = self._videos * fade + 1.0
        self._work = self._work * fade + work_s
        self._squares = self._squares * fade + work_s * work_s

    @property
    def long_work_s(self) -> float:
        """GPU-seconds of the video that the average GPU-second is spent on: only long ones are longer. 0 at first."""
        return self._squares / self._work if self._work else 0.0

    def per_second(self, now_s: float) -> tuple[float, float]:
        """Videos and work a second. Little is known at the start: a fifth of the memory counts as seen."""
        if self._began_s is None:
            return 0.0, 0.0
        seen = max(0.2, 1.0 - math.exp((self._began_s - now_s) / self._memory_s))
        scale = math.exp((self._last_s - now_s) / self._memory_s) / (self._memory_s * seen)
        return self._videos * scale, self._work * scale


class ReferenceTail:
    """The latency that all but ``share`` of the last ``window`` videos would have had, first come, first served.

    The reference is a single queue in front of GPUs that never idle while work waits: a video's latency is the work
    it finds, over the GPUs, and its own time. No schedule is simulated, so an arrival costs O(log window).
    """

    def __init__(self, share: float, window: int) -> None:
        self._share = share
        self._window = window
        self._backlog = 0.0
        self._last_s = 0.0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self.seconds = 0.0

    def arrived(self, work_s: float, own_s: float, gpus: int, now_s: float) -> None:
        """A video of ``work_s`` GPU-seconds, that takes ``own_s`` from its start to its end, comes."""
        self._backlog = max(0.0, self._backlog - (now_s - self._last_s) * gpus)
        self._last_s = now_s
        latency_s = self._backlog / gpus + own_s
        self._backlog += work_s
        self._recent.append(latency_s)
        insort(self._sorted, latency_s)
        if len(self._recent) > self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        last = len(self._sorted) - 1
        self.seconds = self._sorted[math.ceil((1.0 - self._share) * last)]
