"""What is done for one sequence and fails is that sequence's fault, or the process's if it fails again and again."""

import asyncio
from collections.abc import Sequence

import pytest

from common.language.held import Held
from common.language.tasks import SequenceTasks
from tests.support.sequences import sequence


async def fail() -> None:
    raise RuntimeError("nobody knows why")


async def succeed() -> None:
    pass


class Instance:
    """Does things for sequences, one after another; ``lost`` are those that it gave up."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, str]] = []

    async def lose(self, one: Held, error: Exception) -> None:
        self.lost.append((one.key, str(error)))

    async def run(self, *kinds: str) -> None:
        """Kinds of what fails, each after a ``+`` of what does not."""
        async with asyncio.TaskGroup() as group:
            tasks = SequenceTasks(lambda work, name: group.create_task(work, name=name), self.lose)
            for number, kind in enumerate(kinds):
                work = succeed if kind.startswith("+") else fail
                await asyncio.wait((tasks.spawn(sequence(str(number)), work, kind.removeprefix("+")),))


@pytest.mark.parametrize(
    ("kinds", "lost"),
    [
        (["hand"], [0]),
        (["hand", "hand", "+hand", "hand", "hand"], [0, 1, 3, 4]),
        (["hand", "ask", "hand", "ask"], [0, 1, 2, 3]),
    ],
)
async def test_one_sequence_is_lost_and_the_others_go_on(kinds: Sequence[str], lost: Sequence[int]) -> None:
    instance = Instance()
    await instance.run(*kinds)
    assert instance.lost == [(f"{number}/1", "nobody knows why") for number in lost]


async def test_what_always_fails_ends_the_process_whatever_else_succeeds() -> None:
    instance = Instance()
    with pytest.raises(ExceptionGroup) as failed:
        await instance.run("hand", "+ask", "hand", "+ask", "hand")
    assert [str(error) for error in failed.value.exceptions] == ["nobody knows why"]
    assert [key for key, _ in instance.lost] == ["0/1", "2/1"]
