"""Work that several processes share."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import TypeVar

from common.runtime.tether import tether_to_starter

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(do: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """The results in the order of the tasks, which go to ``workers`` processes; one worker is this process.

    Who stops asking, or is interrupted, has the processes end at once.
    """
    if workers <= 1:
        yield from map(do, tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=tether_to_starter) as pool:
        waited_for = deque(pool.submit(do, task) for task in tasks)
        try:
            while waited_for:
                yield waited_for[0].result()
                waited_for.popleft()
        finally:
            # The pool itself would have everything done first that is still to do.
            for process in active_children() if waited_for else ():
                process.terminate()
