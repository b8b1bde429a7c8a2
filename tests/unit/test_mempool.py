"""MemPool: what it finds has been written, and its books balance, whatever is done in whatever order."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.mempool.address import BLOCK_TOKENS, Address, Medium, MemoryType
from common.mempool.allocator import Access, WrongBlock
from common.mempool.events import Change, PoolEvent
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier, disk_tier, dram_tier
from common.messages.chat import pack_tokens, tokens_in, unpack_tokens

# What one block's tokens are, in short: each symbol stands for 16 of them.
Symbols = tuple[int, ...]
GARBAGE = -1


def packed(symbols: Symbols, beyond: int = 0) -> bytes:
    """16 tokens for each symbol, and some that fill no block."""
    return pack_tokens([symbol for symbol in symbols for _ in range(BLOCK_TOKENS)] + [7] * beyond)


def content(symbols: Symbols) -> int:
    """What a block holds whose tokens are the last of ``symbols``: it depends on all before it, as keys do."""
    value = 0
    for symbol in symbols:
        value = 3 * value + symbol + 1
    return value


def pool_of(hbm: int, dram: int = 0, disk: int = 0, folder: Path | None = None) -> MemPool:
    like = torch.full((hbm, 1), GARBAGE)
    tiers = [dram_tier(like, dram * 8)]
    if folder is not None:
        tiers.append(disk_tier(like, disk * 8, folder))
    return MemPool("own", Tier.over(like), [tier for tier in tiers if tier is not None])


def written(pool: MemPool, symbols: Symbols, held: list[Address] | None = None) -> list[Address]:
    """Blocks for a sequence, computed."""
    addresses = [*(held or [])]
    new = pool.alloc_mem(len(symbols) - len(addresses))
    assert new is not None
    addresses += new
    for place, address in enumerate(addresses):
        pool.tiers[address.medium].memory[address.block] = content(symbols[: place + 1])
    return addresses


def media(addresses: list[Address]) -> list[Medium]:
    return [address.medium for address in addresses]


def check(pool: MemPool, symbols: Symbols, addresses: list[Address]) -> None:
    """What is matched is what was computed."""
    assert media(addresses) == sorted(media(addresses))
    for place, address in enumerate(addresses):
        assert pool.tiers[address.medium].memory[address.block].item() == content(symbols[: place + 1])


def test_the_longest_known_beginning_is_found_in_whole_blocks() -> None:
    pool = pool_of(8)
    addresses = pool.insert(packed((1, 2, 3), 5), written(pool, (1, 2, 3)))
    assert pool.match(packed((1, 2, 3, 4))) == addresses
    assert pool.match(packed((1, 2), 15)) == addresses[:2]
    assert pool.match(packed((1, 2, 2))) == addresses[:2]
    assert pool.match(packed((2,))) == pool.match(b"") == []
    assert pool.hbm.allocator.idle_blocks == 3 and pool.available_blocks == 8


def test_a_copy_of_what_is_known_loses() -> None:
    pool = pool_of(8)
    first = pool.insert(packed((1, 2)), written(pool, (1, 2)))
    second = written(pool, (1, 2, 3))
    held = pool.insert(packed((1, 2, 3)), second, hold=True)
    assert held == first + second[2:]
    assert pool.hbm.allocator.free_blocks == 5 and pool.hbm.allocator.idle_blocks == 0
    pool.free_mem(held)
    assert pool.hbm.allocator.idle_blocks == 3
    with pytest.raises(WrongBlock):
        pool.free_mem(second[:1])


def test_who_holds_a_block_pins_it_and_the_oldest_ends_go_first() -> None:
    pool = pool_of(6)
    pool.insert(packed((1, 2, 3)), written(pool, (1, 2, 3)))
    pool.insert(packed((1, 4, 5)), written(pool, (1, 4, 5), pool.match(packed((1,)), hold=True)))
    held = pool.match(packed((1, 2)), hold=True)
    assert pool.available_blocks == 4
    # Of 1 2 3 only the end is nobody's; 5 was used after it, and goes before 4.
    for left in ((2, 3), (2, 2), (2, 1)):
        assert pool.alloc_mem(2 if left == (2, 3) else 1) is not None
        assert (len(pool.match(packed((1, 2, 3)))), len(pool.match(packed((1, 4, 5))))) == left
    assert pool.alloc_mem(1) is None
    assert pool.match(packed((1, 2, 3))) == held and pool.match(packed((1, 4))) == held[:1]


def test_what_nobody_holds_goes_though_somebody_holds_what_follows() -> None:
    pool = pool_of(3)
    pool.insert(packed((1, 2, 3)), written(pool, (1, 2, 3)))
    held = pool.match(packed((1, 2, 3)), hold=True)
    pool.free_mem(held[:2])
    assert pool.available_blocks == 2 and len(pool.alloc_mem(2) or []) == 2
    assert pool.match(packed((1,))) == []
    pool.free_mem(held[2:])


def test_blocks_go_through_the_tiers_and_come_back(tmp_path: Path) -> None:
    pool = pool_of(4, 2, 2, tmp_path)
    assert not list(tmp_path.iterdir())
    sequence = (1, 2, 3, 4)
    pool.insert(packed(sequence), written(pool, sequence))
    assert pool.swap_out(3) == 3
    cold = pool.match(packed(sequence), hold=True)
    assert media(cold) == [Medium.HBM, Medium.DRAM, Medium.DRAM, Medium.DISK]
    check(pool, sequence, cold)
    warm = pool.swap_in(cold)
    assert warm is not None and media(warm) == [Medium.HBM] * 4 and warm == pool.match(packed(sequence))
    check(pool, sequence, warm)
    assert pool.swap_in(warm) == warm and pool.available_blocks == 0
    pool.free_mem(warm)
    assert pool.available_blocks == 4
    # With every tier full, the oldest of the coldest is dropped for good.
    for symbol in (5, 6, 7, 8, 9):
        pool.insert(packed((symbol,)), written(pool, (symbol,)))
    assert len(pool.match(packed(sequence))) == 3
    check(pool, sequence, pool.match(packed(sequence)))


def test_swapping_in_is_all_or_nothing_and_from_the_first_block_on() -> None:
    pool = pool_of(3, 4)
    pool.insert(packed((1, 2, 3)), written(pool, (1, 2, 3)))
    pool.swap_out(3)
    cold = pool.match(packed((1, 2, 3)), hold=True)
    others = pool.alloc_mem(1) or []
    assert pool.swap_in(cold) is None and pool.match(packed((1, 2, 3))) == cold
    with pytest.raises(ValueError, match="first block"):
        pool.swap_in(cold[1:])
    assert pool.available_blocks == 2
    warm = pool.swap_in(cold[:2]) or []
    assert media(pool.match(packed((1, 2, 3)))) == [Medium.HBM, Medium.HBM, Medium.DRAM]
    pool.free_mem(warm + cold[2:] + others)


def test_what_is_computed_again_takes_the_place_of_colder_copies() -> None:
    pool = pool_of(4, 4)
    pool.insert(packed((1, 2)), written(pool, (1, 2)))
    pool.swap_out(2)
    again = pool.insert(packed((1, 2, 3)), written(pool, (1, 2, 3)))
    assert media(again) == [Medium.HBM] * 3
    assert pool.tiers[Medium.DRAM].allocator.free_blocks == 4


def test_memory_types(tmp_path: Path) -> None:
    pool = pool_of(2, 3, 1, tmp_path)
    far = pool.alloc_mem(1, MemoryType.DRAM_ONLY) or []
    mixed = pool.alloc_mem(4, MemoryType.MIXED) or []
    assert media(far + mixed) == [Medium.DRAM, Medium.HBM, Medium.HBM, Medium.DRAM, Medium.DRAM]
    assert pool.alloc_mem(1, MemoryType.MIXED) is None
    pool.insert(packed((1, 2, 3)), mixed[:3])
    pool.free_mem(far + mixed[3:])
    assert media(pool.match(packed((1, 2, 3)))) == [Medium.HBM, Medium.HBM, Medium.DRAM]
    assert pool_of(2).alloc_mem(1, MemoryType.DRAM_ONLY) is None


def test_deleting_forgets_what_no_other_sequence_shares() -> None:
    pool = pool_of(8)
    pool.insert(packed((1, 2, 3)), written(pool, (1, 2, 3)))
    held = pool.match(packed((1,)), hold=True)
    pool.insert(packed((1, 4)), written(pool, (1, 4), held))
    assert pool.delete(packed((1,))) == pool.delete(packed((9,))) == pool.delete(b"") == 0
    assert pool.delete(packed((1, 2))) == 0
    assert pool.delete(packed((1, 2, 3), 4)) == 2
    assert len(pool.match(packed((1, 2, 3)))) == 1
    assert pool.delete(packed((1, 4))) == 1 and pool.delete(packed((1,))) == 1
    assert pool.hbm.allocator.free_blocks == 8


def test_wrong_addresses_change_nothing() -> None:
    pool = pool_of(4, 2)
    held = written(pool, (1, 2))
    far = pool.alloc_mem(1, MemoryType.DRAM_ONLY) or []
    with pytest.raises(ValueError, match="warmer"):
        pool.insert(packed((1, 2)), [*far, *held])
    with pytest.raises(ValueError, match="1 addresses for 2"):
        pool.insert(packed((1, 2)), held[:1])
    for wrong in (held[0]._replace(instance="other"), held[0]._replace(epoch=9), held[0]._replace(medium=Medium.DISK)):
        with pytest.raises(WrongBlock):
            pool.insert(packed((1, 2)), [wrong, held[1]])
        with pytest.raises(WrongBlock):
            pool.free_mem([held[1], wrong])
    assert pool.match(packed((1, 2))) == [] and pool.hbm.allocator.held_blocks == 2
    with pytest.raises(ValueError, match="tiers"):
        MemPool("own", pool.hbm, [pool.hbm])


@dataclass
class Running:
    """A sequence that somebody computes: so many of its blocks are written. ``access``: somebody also reads them."""

    symbols: Symbols
    held: list[Address]
    done: int
    accesses: list[Access] = field(default_factory=list)


@dataclass
class Mirror:
    """What is known, as somebody elsewhere hears it: every sequence's every beginning."""

    known: set[Symbols] = field(default_factory=set)
    heard: int = 0

    def hear(self, event: PoolEvent) -> None:
        self.heard += 1
        assert event.number == self.heard
        symbols = tuple(unpack_tokens(event.tokens)[::BLOCK_TOKENS])
        kept = event.kept_tokens // BLOCK_TOKENS
        if event.change is Change.INSERTED:
            assert kept == len(symbols) == tokens_in(event.tokens) // BLOCK_TOKENS
            self.known |= {symbols[:length] for length in range(1, len(symbols) + 1)}
        else:
            gone = symbols[: kept + 1]
            assert symbols in self.known and kept < len(symbols)
            self.known = {one for one in self.known if one[: len(gone)] != gone}

    def longest(self, symbols: Symbols) -> int:
        return max((length for length in range(1, len(symbols) + 1) if symbols[:length] in self.known), default=0)


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


class Pools(RuleBasedStateMachine):
    """Sequences are begun, computed, indexed, swapped, received, and die half-way, in any order."""

    @initialize(hbm=st.integers(3, 12), dram=st.integers(0, 5), disk=st.integers(0, 4))
    def begin(self, hbm: int, dram: int, disk: int) -> None:
        self.pool = pool_of(hbm, dram, disk, Path(tempfile.gettempdir()))
        self.mirror = Mirror()
        self.pool.listener = self.mirror.hear
        self.running: list[Running] = []
        # Reads and writes under way of sequences that are no more.
        self.late: list[Access] = []

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for one in self.running:
            self.pool.free_mem(one.held)
            self.late += one.accesses
        for access in self.late:
            self.pool.hbm.allocator.end_access(access)
        for tier in self.pool.tiers.values():
            books = tier.allocator
            assert books.free_blocks + books.idle_blocks == books.blocks and not books.set_aside_blocks
        everything = self.pool.alloc_mem(self.pool.hbm.allocator.blocks)
        assert everything is not None

    def _fill(self, addresses: list[Address]) -> None:
        """Whoever had them before left something there."""
        for address in addresses:
            self.pool.tiers[address.medium].memory[address.block] = GARBAGE

    @rule(symbols=SEQUENCES)
    def start(self, symbols: Symbols) -> None:
        """As an engine does: match, swap in, allocate the rest."""
        known = self.pool.match(packed(symbols))
        free = self.pool.available_blocks
        need = len(symbols) - self.pool.held_by_others(known)
        held = self.pool.match(packed(symbols), hold=True)
        assert held == known
        warm = self.pool.swap_in(held)
        new = (
            self.pool.alloc_mem(len(symbols) - len(held), after=warm[-1] if warm else None)
            if warm is not None
            else None
        )
        # What is asked beforehand is exact.
        assert (new is not None) == (need <= free)
        if warm is None or new is None:
            self.pool.free_mem(held if warm is None else warm)
            return
        check(self.pool, symbols, warm)
        self._fill(new)
        self.running.append(Running(symbols, warm + new, len(warm)))

    @rule(symbols=SEQUENCES, kind=st.sampled_from(MemoryType))
    def receive(self, symbols: Symbols, kind: MemoryType) -> None:
        """As a receiver does: blocks for all, written by somebody else."""
        held = self.pool.alloc_mem(len(symbols), kind)
        if held is not None:
            self._fill(held)
            self.running.append(Running(symbols, held, 0))

    @rule(symbols=SEQUENCES, beyond=SEQUENCES)
    def converse(self, symbols: Symbols, beyond: Symbols) -> None:
        """Two turns of a chat from their beginning to their end."""
        for turn in (symbols, symbols + beyond):
            before = len(self.running)
            self.start(turn)
            if len(self.running) > before:
                one = self.running.pop()
                self._compute(one, len(turn))
                self.pool.insert(packed(turn), one.held)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 6))
    def compute(self, data: st.DataObject, count: int) -> None:
        self._compute(data.draw(st.sampled_from(self.running)), count)

    def _compute(self, one: Running, count: int) -> None:
        for place in range(one.done, min(one.done + count, len(one.symbols))):
            address = one.held[place]
            self.pool.tiers[address.medium].memory[address.block] = content(one.symbols[: place + 1])
            one.done = place + 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), hold=st.booleans())
    def insert(self, data: st.DataObject, hold: bool) -> None:
        one = data.draw(st.sampled_from(self.running))
        stay = self.pool.insert(packed(one.symbols[: one.done], 3), one.held, hold)
        check(self.pool, one.symbols[: one.done], stay[: one.done])
        assert self.mirror.longest(one.symbols) >= one.done
        if hold:
            one.held = stay
        else:
            self.running.remove(one)
            self.late += one.accesses

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """Whoever computes it is gone, whatever it was at. Its late writes hit only what nobody else has."""
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.pool.free_mem(one.held)
        self.late += one.accesses
        fresh = [address for address in one.held[one.done :] if address.medium is Medium.HBM]
        under_way = {block for access in one.accesses for block in access.blocks}
        for address in fresh:
            if address.block in under_way:
                self.pool.hbm.memory[address.block] = GARBAGE

    @precondition(lambda self: self.running)
    @rule(data=st.data(), first=st.integers(0, 5))
    def access(self, data: st.DataObject, first: int) -> None:
        one = data.draw(st.sampled_from(self.running))
        blocks = [address.block for address in one.held[first:] if address.medium is Medium.HBM]
        one.accesses.append(self.pool.hbm.allocator.begin_access(blocks))

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def end_late(self, data: st.DataObject) -> None:
        access = data.draw(st.sampled_from(self.late))
        self.late.remove(access)
        self.pool.hbm.allocator.end_access(access)

    @rule(symbols=SEQUENCES)
    def match(self, symbols: Symbols) -> None:
        found = self.pool.match(packed(symbols, 9))
        check(self.pool, symbols, found)
        assert len(found) == self.mirror.longest(symbols)

    @rule(symbols=SEQUENCES)
    def delete(self, symbols: Symbols) -> None:
        before = self.mirror.longest(symbols)
        count = self.pool.delete(packed(symbols))
        assert self.mirror.longest(symbols) == before - count

    @rule(count=st.integers(0, 5))
    def swap_out(self, count: int) -> None:
        known = set(self.mirror.known)
        free = self.pool.hbm.allocator.free_blocks
        moved = self.pool.swap_out(count)
        assert moved <= count and self.pool.hbm.allocator.free_blocks == free + moved
        assert len(known) - len(self.mirror.known) <= moved

    @rule()
    def free_twice(self) -> None:
        held = self.pool.alloc_mem(1)
        if held is not None:
            self.pool.free_mem(held)
            with pytest.raises(WrongBlock):
                self.pool.free_mem(held)

    @invariant()
    def balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = {address[1:3] for one in self.running for address in one.held}
        indexed = set()
        for symbols in self.mirror.known:
            found = self.pool.match(packed(symbols))
            check(self.pool, symbols, found)
            indexed.add(found[-1][1:3])
        assert len(indexed) == len(self.mirror.known)
        for medium, tier in self.pool.tiers.items():
            books = tier.allocator
            assert books.held_blocks == sum(one[0] == medium for one in held | indexed)
            assert books.indexed_blocks == sum(one[0] == medium for one in indexed)
            assert books.free_blocks + books.held_blocks + books.set_aside_blocks == books.blocks


Pools.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPools = Pools.TestCase
