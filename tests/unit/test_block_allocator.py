"""The allocator's books: all or nothing, epochs, sharing, nothing reused while it is accessed, and neighbours."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.mempool.allocator import Access, BlockAllocator, WrongBlock


def test_all_or_nothing() -> None:
    allocator = BlockAllocator(4)
    assert allocator.allocate(5) is None
    assert allocator.free_blocks == 4
    assert sorted(allocator.allocate(4) or []) == [0, 1, 2, 3]
    assert allocator.allocate(1) is None
    assert allocator.allocate(0) == []


def test_a_sequence_grows_in_place_beside_others() -> None:
    allocator = BlockAllocator(64)
    tables = [allocator.allocate(4) or [] for _ in range(4)]
    for _ in range(6):
        for table in tables:
            table += allocator.allocate(1, after=table[-1]) or []
    assert all(table == list(range(table[0], table[0] + 10)) for table in tables)


def test_scattered_blocks_come_in_few_runs() -> None:
    allocator = BlockAllocator(12)
    allocator.allocate(12)
    allocator.release([0, 2, 3, 4, 6, 7, 9])
    assert allocator.allocate(5) == [2, 3, 4, 6, 7]
    assert allocator.allocate(2) == [0, 9]


def test_an_old_reference_is_recognized() -> None:
    allocator = BlockAllocator(1)
    allocator.allocate(1)
    epoch = allocator.epoch(0)
    assert allocator.is_current(0, epoch)
    allocator.release([0])
    assert not allocator.is_current(0, epoch)
    allocator.allocate(1)
    assert not allocator.is_current(0, epoch)


def test_a_block_is_not_reused_while_a_write_is_under_way() -> None:
    allocator = BlockAllocator(2)
    allocator.allocate(2)
    access = allocator.begin_access([1])
    allocator.release([0, 1])
    assert (allocator.free_blocks, allocator.set_aside_blocks) == (1, 1)
    assert allocator.allocate(2) is None
    allocator.end_access(access)
    assert allocator.free_blocks == 2
    with pytest.raises(WrongBlock):
        allocator.end_access(access)


@pytest.mark.parametrize("blocks", [[2], [0, 0], [-1], [9]])
def test_wrong_books_are_noticed_and_change_nothing(blocks: list[int]) -> None:
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    for call in (allocator.release, allocator.share, allocator.begin_access):
        with pytest.raises(WrongBlock):
            call(blocks)
    assert (allocator.free_blocks, allocator.held_blocks) == (1, 2)


class Books(RuleBasedStateMachine):
    """Sequences come, grow, share, are accessed and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(20)
        self.tables: list[list[int]] = []
        self.accesses: list[Access] = []

    @rule(count=st.integers(1, 6), place=st.integers(0, 50))
    def allocate(self, count: int, place: int) -> None:
        after = self.tables[place][-1] if place < len(self.tables) else None
        free = self.allocator.free_blocks
        busy = {block for table in self.tables for block in table}
        busy |= {block for access in self.accesses for block in access.blocks}
        blocks = self.allocator.allocate(count, after)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count and not busy & set(blocks)
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.allocator.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.allocator.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.accesses.append(self.allocator.begin_access(data.draw(st.sampled_from(self.tables))))

    @precondition(lambda self: self.accesses)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.allocator.end_access(self.accesses.pop(data.draw(st.integers(0, len(self.accesses) - 1))))

    @invariant()
    def balance(self) -> None:
        held = {block for table in self.tables for block in table}
        accessed = {block for access in self.accesses for block in access.blocks}
        assert self.allocator.held_blocks == len(held)
        assert self.allocator.set_aside_blocks == len(accessed - held)
        assert self.allocator.free_blocks == 20 - len(held | accessed)


Books.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestBooks = Books.TestCase
