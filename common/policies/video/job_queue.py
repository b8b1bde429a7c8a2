"""A queue of jobs by rank, from which any job may leave at any time."""

import heapq
from collections.abc import Iterator
from itertools import count

from common.policies.video.state import Job

Rank = tuple[float, ...]


class JobQueue:
    """Jobs by rank, lowest first; equal ranks by their ids. Joining and leaving cost O(log n).

    What has left stays in the heap until it comes to the top, or until such entries outnumber the others.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, str, int, Job]] = []
        self._entries: dict[str, int] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Job]:
        """In order of rank; sorts, so not for every event."""
        entries = self._entries
        return iter([job for _, job_id, number, job in sorted(self._heap) if entries.get(job_id) == number])

    def push(self, job: Job, rank: Rank) -> None:
        """The job joins; one that is in the queue already gets this rank."""
        number = next(self._numbers)
        self._entries[job.job_id] = number
        heapq.heappush(self._heap, (rank, job.job_id, number, job))

    def discard(self, job: Job) -> None:
        """The job leaves, if it is there."""
        self._entries.pop(job.job_id, None)
        if len(self._heap) > 2 * len(self._entries) + 64:
            entries = self._entries
            self._heap = [entry for entry in self._heap if entries.get(entry[1]) == entry[2]]
            heapq.heapify(self._heap)

    def first(self) -> Job | None:
        """The job with the lowest rank; it stays."""
        entry = self._first()
        return entry[3] if entry else None

    def first_rank(self) -> Rank | None:
        """Its rank."""
        entry = self._first()
        return entry[0] if entry else None

    def _first(self) -> tuple[Rank, str, int, Job] | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[1]) == entry[2]:
                return entry
            heapq.heappop(heap)
        return None
