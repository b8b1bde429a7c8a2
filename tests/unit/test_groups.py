"""The keeper of groups: what is kept, what is dropped, and what members are told. Real connections, one process.

Each member is a thread with `Groups` of its own; that they share a process makes no difference to them.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.parallel.errors import GroupBroken
from common.parallel.group import Group
from common.parallel.groups import Groups

TIMEOUT_S = 2.5
KEEP = 3


class Party:
    """Members 0 to 3, each with a thread."""

    def __init__(self) -> None:
        self.groups = [
            Groups(f"m{index}", exchange_timeout_s=TIMEOUT_S, meeting_timeout_s=TIMEOUT_S, keep=KEEP)
            for index in range(4)
        ]
        self._threads = [ThreadPoolExecutor(1, f"member-{index}") for index in range(4)]

    def start(self, index: int, members: tuple[int, ...], token: int) -> "Future[Group]":
        """Member `index` enters a group that its first member leads."""
        names = [f"m{member}" for member in members]
        return self._threads[index].submit(self.groups[index].enter, names, self.groups[members[0]].address, token)

    def enter(self, members: tuple[int, ...], token: int) -> list[Group]:
        entering = [self.start(index, members, token) for index in members]
        return [each.result(30) for each in entering]

    def each(self, groups: list[Group], work: Callable[[Group], object]) -> list[object]:
        """Run `work` for every member's end of one group at the same time."""
        running = [thread.submit(work, group) for thread, group in zip(self._threads, groups, strict=False)]
        return [each.result(30) for each in running]

    def close(self) -> None:
        for groups, thread in zip(self.groups, self._threads, strict=True):
            groups.close()
            thread.shutdown()


@pytest.fixture
def party() -> Iterator[Party]:
    party = Party()
    yield party
    party.close()


def test_any_member_set_in_any_order_exchanges(party: Party) -> None:
    groups = party.enter((2, 0, 3), token=1)
    assert [group.rank for group in groups] == [0, 1, 2]
    assert all(group.members == ("m2", "m0", "m3") and group.size == 3 for group in groups)

    def exchange(group: Group) -> object:
        # To rank r: as many numbers as this rank and r have together; nothing to oneself.
        counts = [group.rank + other if other != group.rank else 0 for other in range(3)]
        pieces = [torch.full((count,), 10.0 * group.rank + other) for other, count in enumerate(counts)]
        got = group.all_to_all(pieces, [(count,) for count in counts])
        assert [piece.tolist() for piece in got] == [
            [10.0 * other + group.rank] * count for other, count in enumerate(counts)
        ]
        half = torch.tensor([[group.rank, 7]], dtype=torch.bfloat16)
        assert [piece.tolist() for piece in group.all_gather(half)] == [[[0, 7]], [[1, 7]], [[2, 7]]]
        assert group.broadcast(torch.full((2, 2), group.rank), root=2).tolist() == [[2, 2], [2, 2]]
        return group.agree(100 + group.rank, root=1)

    assert party.each(groups, exchange) == [101, 101, 101]


def test_a_group_of_one_needs_nobody(party: Party) -> None:
    (group,) = party.enter((1,), token=1)
    piece = torch.arange(6)
    assert torch.equal(group.all_to_all([piece], [(2, 3)])[0], piece.view(2, 3))
    assert group.all_gather(piece)[0] is piece
    assert group.agree(5) == 5
    assert group.compare(6) == [6]
    group.close()
    with pytest.raises(GroupBroken):
        group.agree(5)


def test_a_known_member_set_is_the_same_group_again(party: Party) -> None:
    first = party.enter((0, 1), token=1)
    other_order = party.enter((1, 0), token=2)
    again = party.enter((0, 1), token=3)
    assert all(one is two for one, two in zip(first, again, strict=True))
    assert all(one is not two for one, two in zip(first, reversed(other_order), strict=True))
    assert party.groups[0].kept == [("m1", "m0"), ("m0", "m1")]


def test_the_longest_unused_group_is_closed_when_there_are_too_many(party: Party) -> None:
    sets = [(0, 1), (1, 0), (0, 1, 2), (0, 2, 1)]
    entered = [party.enter(members, token) for token, members in enumerate(sets, start=1)]
    assert len(party.groups[0].kept) == KEEP
    assert entered[0][0].closed and not entered[1][0].closed


def test_what_is_dropped_gives_its_file_descriptors_and_threads_back(party: Party) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    party.enter((0, 1), token=1)
    party.enter((1, 0), token=2)
    before = held()
    for token in range(3, 9):
        party.groups[0].forget("m1")
        party.groups[1].forget("m1")
        party.enter((0, 1), token)
        party.enter((1, 0), token)
    deadline = time.monotonic() + 10
    while held() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held() <= before


def test_where_one_has_dropped_a_group_all_form_it_anew(party: Party) -> None:
    first = party.enter((0, 1, 2), token=1)
    party.groups[2].forget("m0")
    started = time.monotonic()
    again = party.enter((0, 1, 2), token=2)
    assert time.monotonic() - started < TIMEOUT_S
    assert not any(one is two for one, two in zip(first, again, strict=True))
    assert party.each(again, lambda group: group.agree(4)) == [4, 4, 4]


def test_a_dead_members_groups_are_forgotten_and_no_others(party: Party) -> None:
    party.enter((0, 1), token=1)
    party.enter((0, 2), token=2)
    party.groups[0].forget("m1")
    assert party.groups[0].kept == [("m0", "m2")]


def test_who_does_not_come_is_named(party: Party) -> None:
    entering = [party.start(index, (0, 1, 3), token=1) for index in (0, 3)]
    for each in entering:
        with pytest.raises(GroupBroken) as broken:
            each.result(30)
        assert broken.value.missing == ("m1",)
        assert broken.value.members == ("m0", "m1", "m3")
    # The next meeting finds nothing of the failed one in its way.
    assert len(party.enter((0, 1, 3), token=2)) == 3


def test_members_of_different_leases_are_told_so(party: Party) -> None:
    party.enter((0, 1), token=1)
    entering = [party.start(0, (0, 1), token=2), party.start(1, (0, 1), token=3)]
    for each in entering:
        with pytest.raises(GroupBroken, match="different tokens"):
            each.result(30)
    assert not party.groups[0].kept


def test_a_member_that_closes_breaks_the_others_at_once(party: Party) -> None:
    groups = party.enter((0, 1, 2), token=1)
    waiting = threading.Event()

    def work(group: Group) -> object:
        if group.rank == 2:
            waiting.wait(10)
            group.close()
            return None
        if group.rank == 0:
            waiting.set()
        started = time.monotonic()
        with pytest.raises(GroupBroken):
            group.compare(1)
        assert time.monotonic() - started < TIMEOUT_S
        return None

    party.each(groups, work)
    assert all(group.closed for group in groups)


def test_a_member_that_does_nothing_breaks_the_others_after_the_time_out(party: Party) -> None:
    groups = party.enter((0, 1), token=1)
    started = time.monotonic()
    with pytest.raises(GroupBroken):
        groups[0].agree(1, root=1)
    assert TIMEOUT_S * 0.9 < time.monotonic() - started < TIMEOUT_S + 5
    with pytest.raises(GroupBroken):
        groups[1].agree(1, root=1)


def test_no_meeting_place_is_a_broken_group(party: Party) -> None:
    with pytest.raises(GroupBroken, match=r"no meeting place at 127\.0\.0\.1:9"):
        party.groups[0].enter(["m0", "m1"], "127.0.0.1:9", 1)


def test_a_stranger_cannot_enter(party: Party) -> None:
    for members in (["m1", "m2"], ["m0", "m0"]):
        with pytest.raises(ValueError, match="m0 cannot enter"):
            party.groups[0].enter(members, party.groups[0].address, 1)


def test_no_global_world_exists(party: Party) -> None:
    party.enter((0, 1), token=1)
    assert not torch.distributed.is_initialized()


def test_only_the_connector_knows_the_backends() -> None:
    room = Path(__file__).resolve().parent.parent.parent / "common" / "parallel"
    naming = [file.name for file in room.glob("*.py") if "ProcessGroup" in file.read_text()]
    assert naming == ["transport.py"]
