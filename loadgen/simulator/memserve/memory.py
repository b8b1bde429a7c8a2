"""An instance's memory: the live ``MemPool`` over blocks without bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.mempool.address import BLOCK_TOKENS, KEY_BYTES, Address, Medium
from common.mempool.events import Change, PoolEvent
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier
from common.policies.language.prompt_index import IndexChange, IndexPublisher


@dataclass(slots=True)
class Held:
    """The blocks of one sequence, in order. ``cached``: how many were there already; ``swapped``: of these, in DRAM."""

    addresses: list[Address]
    cached: int
    swapped: int


class Memory:
    """What an instance holds and knows. ``published`` is told what changes, as instances tell the scheduler."""

    def __init__(
        self, instance: str, blocks: int, dram_blocks: int, published: Callable[[IndexChange], None], incarnation: int
    ) -> None:
        self.publisher = IndexPublisher(instance, incarnation, KEY_BYTES)
        self._published = published
        colder = [Tier.over(torch.empty((dram_blocks, 0)), Medium.DRAM)] if dram_blocks else []
        self._pool = MemPool(instance, Tier.over(torch.empty((blocks, 0))), colder, self._changed)

    @property
    def blocks(self) -> int:
        return self._pool.hbm.allocator.blocks

    @property
    def held_blocks(self) -> int:
        """How many of HBM sequences hold, beyond what only the index has."""
        return self.blocks - self._pool.available_blocks

    def known_blocks(self, tokens: bytes) -> int:
        """How many of its first blocks are here."""
        return len(self._pool.match(tokens))

    def take(self, tokens: bytes, most_cached: int, blocks: int) -> Held | None:
        """Hold what is known of a sequence, at most so much, and new blocks, so many in all; None: there is no room."""
        known = self._pool.match(tokens, hold=True)
        if len(known) > most_cached:
            self._pool.free_mem(known[most_cached:])
            del known[most_cached:]
        swapped = sum(address.medium is not Medium.HBM for address in known)
        near = self._pool.swap_in(known) if swapped else known
        fresh = None if near is None else self._pool.alloc_mem(max(0, blocks - len(near)))
        if near is None or fresh is None:
            self._pool.free_mem(known if near is None else near)
            return None
        return Held(near + fresh, len(near), swapped)

    def hold(self, tokens: bytes, blocks: int) -> Held:
        """Hold what is known of a sequence, at most so much, wherever it is: to be read, not to be computed with."""
        known = self._pool.match(tokens[: blocks * KEY_BYTES], hold=True)
        return Held(known, len(known), 0)

    def index(self, held: Held, tokens: bytes) -> None:
        """The first blocks of a sequence are written: others may find them. It goes on holding all of them."""
        whole = len(tokens) // KEY_BYTES
        if whole:
            held.addresses[:whole] = self._pool.insert(tokens, held.addresses[:whole], hold=True)

    def keep(self, tokens: bytes) -> None:
        """What was received becomes historical, if there is room for it."""
        whole = len(tokens) // KEY_BYTES
        held = self.take(tokens, whole, whole)
        if held is not None:
            self.index(held, tokens)
            self.free(held)

    def free(self, held: Held) -> None:
        """Let go of a sequence; what is indexed stays as long as there is room."""
        self._pool.free_mem(held.addresses)
        held.addresses = []

    def _changed(self, event: PoolEvent) -> None:
        if event.change is Change.INSERTED:
            self._published(self.publisher.inserted(event.tokens))
        else:
            self._published(self.publisher.evicted(event.tokens, event.kept_tokens // BLOCK_TOKENS))
