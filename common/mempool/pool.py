"""MemPool: one instance's memory of keys and values, and what is in it (MemServe, section 4).

Blocks that a sequence computes with are its own (active KV) until ``insert`` gives them to the index as well, where
other sequences find them (historical KV). Holding a block pins it: what nobody but the index holds is evicted when
memory is needed. Whatever is in the index has been written, for a caller inserts what it has computed or received.

Departures: a pool gives out its own memory only, so ``alloc_mem`` takes no instance (a receiver allocates for a sender,
see ``common.mempool.transfer``); and there is no ``evict`` to call, for it happens by itself.
"""

from collections.abc import Callable, Sequence

from common.mempool.address import KEY_BYTES, TOKEN_BYTES, Address, Medium, MemoryType
from common.mempool.allocator import WrongBlock
from common.mempool.events import Change, PoolEvent
from common.mempool.eviction import Eviction
from common.mempool.index import Node, RadixIndex
from common.mempool.tiers import Tier


class MemPool:
    """One instance's tiers and their index. Its calls are for one thread at a time.

    Args:
        instance: whose it is; every address says so.
        hbm: the memory that the model computes with.
        colder: where evicted blocks go, the warmer tier first.
        listener: is told every change of the index within the call that makes it. It must not fail.
    """

    def __init__(
        self,
        instance: str,
        hbm: Tier,
        colder: Sequence[Tier] = (),
        listener: Callable[[PoolEvent], None] | None = None,
    ) -> None:
        self.instance = instance
        self.tiers = {tier.medium: tier for tier in (hbm, *colder)}
        if list(self.tiers) != sorted(self.tiers) or hbm.medium is not Medium.HBM or len(self.tiers) <= len(colder):
            raise ValueError("tiers go from HBM to the coldest, one of each")
        self.listener = listener
        self._index = RadixIndex()
        self._eviction = Eviction(self._index, self.tiers, self._dropped)
        self._events = 0

    @property
    def hbm(self) -> Tier:
        return self.tiers[Medium.HBM]

    @property
    def available_blocks(self) -> int:
        """How many blocks of HBM ``alloc_mem`` could give now."""
        books = self.hbm.allocator
        return books.free_blocks + books.idle_blocks

    # --- memory --------------------------------------------------------------------------------------------------

    def alloc_mem(
        self, size: int, kind: MemoryType = MemoryType.HBM_ONLY, after: Address | None = None
    ) -> list[Address] | None:
        """Give out blocks, held by the caller. What nobody holds is evicted if need be.

        Args:
            size: how many, all or nothing.
            kind: ``MIXED``: HBM as far as it is free, then DRAM.
            after: the last block that the sequence has: it goes on there if that is free.

        Returns:
            In the order to use them; None if there are not enough.
        """
        if kind is MemoryType.HBM_ONLY:
            return self._allocate(Medium.HBM, size, after)
        near = min(size, self.hbm.allocator.free_blocks) if kind is MemoryType.MIXED else 0
        far = self._allocate(Medium.DRAM, size - near)
        # Moving others to DRAM takes none of HBM, so what was free still is.
        return None if far is None else [*(self._allocate(Medium.HBM, near, after) or ()), *far]

    def free_mem(self, addresses: Sequence[Address]) -> None:
        """Give up blocks that the caller holds. Those that the index has stay there; others are free.

        Raises:
            WrongBlock: one is nobody's, of an earlier life, or another instance's. Nothing is changed.
        """
        for medium, blocks in self._by_medium(addresses).items():
            self.tiers[medium].allocator.release(blocks)

    def swap_out(self, num_blocks: int) -> int:
        """Move blocks that nobody holds from HBM to the next tier, those used longest ago first; how many it were."""
        return self._eviction.evict(Medium.HBM, num_blocks, may_drop=False)

    def swap_in(self, addresses: Sequence[Address]) -> list[Address] | None:
        """Bring blocks to HBM. All or nothing.

        Args:
            addresses: a sequence from its first block on, held by the caller, as ``match`` gives them; what is in HBM
                stays where it is.

        Returns:
            Where they are now, held by the caller in place of ``addresses``; None: HBM has no room for them.

        Raises:
            WrongBlock: see ``free_mem``; ValueError: something before them is not in HBM. Nothing is changed.
        """
        self._by_medium(addresses)
        cold = [address for address in addresses if address.medium is not Medium.HBM]
        fresh = self._allocate(Medium.HBM, len(cold))
        if fresh is None:
            return None
        moved = dict(zip(cold, fresh, strict=True))
        try:
            nodes = self._nodes_of(cold)
        except ValueError:
            self.free_mem(fresh)
            raise
        for medium, blocks in self._by_medium(cold).items():
            run = [moved[address].block for address in cold if address.medium is medium]
            self.tiers[medium].copy_to(self.hbm, blocks, run)
        for node, count, place in nodes:
            head = self._index.split(node, count)
            former, medium = head.blocks, head.medium
            self._index.relocate(head, Medium.HBM, [moved[one].block for one in cold[place : place + count]])
            self.hbm.allocator.index(head.blocks)
            self.tiers[medium].allocator.unindex(former)
        self.free_mem(cold)
        return [moved.get(address, address) for address in addresses]

    # --- index ---------------------------------------------------------------------------------------------------

    def match(self, tokens: bytes, hold: bool = False) -> list[Address]:
        """The longest beginning of packed ``tokens`` whose keys and values are here, in whole blocks.

        Args:
            hold: the caller holds them from now on, and gives them up with ``free_mem``; and they count as used.
        """
        if not hold:
            found = self._index.find(tokens)
            return [one for node, count in found for one in self._addresses(node.medium, node.blocks[:count])]
        path = self._index.use(tokens)
        for node in path:
            self.tiers[node.medium].allocator.share(node.blocks)
        return self._addresses_of(path)

    def use(self, tokens: bytes) -> int:
        """How many blocks ``match`` finds; they count as used."""
        return sum(len(node.blocks) for node in self._index.use(tokens))

    def held_by_others(self, addresses: Sequence[Address]) -> int:
        """How many of them take nothing of ``available_blocks`` when they are held once more."""
        is_idle = self.hbm.allocator.is_idle
        return sum(address.medium is Medium.HBM and not is_idle(address.block) for address in addresses)

    def insert(self, tokens: bytes, addresses: Sequence[Address], hold: bool = False) -> list[Address]:
        """Let the keys and values of a sequence be found: active KV becomes historical.

        Of what is known already the copy that the index has stays, unless it is in a colder medium.

        Args:
            tokens: packed; what is beyond the last whole block is not indexed.
            addresses: of all its blocks from the first token on, held by the caller. Every whole block has been
                written, and none is in a warmer medium than one before it.
            hold: the caller holds what is returned, in place of what it gave. Otherwise it gives up all of it.

        Returns:
            Where the sequence is now.

        Raises:
            WrongBlock: see ``free_mem``; ValueError: too few addresses, or not in this order. Nothing is changed.
        """
        whole = len(tokens) // KEY_BYTES
        given, rest = list(addresses[:whole]), list(addresses[whole:])
        self._by_medium(addresses)
        media = [address.medium for address in given]
        if len(given) < whole or media != sorted(media):
            raise ValueError(f"{len(given)} addresses for {whole} blocks, or a warmer one after a colder one")
        stay = self._bind(tokens[: whole * KEY_BYTES], given)
        if hold:
            for medium, blocks in self._by_medium(
                [new for new, own in zip(stay, given, strict=True) if new != own]
            ).items():
                self.tiers[medium].allocator.share(blocks)
            self.free_mem([own for new, own in zip(stay, given, strict=True) if new != own])
        else:
            self.free_mem(addresses)
        return stay + rest

    def delete(self, tokens: bytes) -> int:
        """Forget a sequence: its end, back to where others share it. Whoever holds its blocks goes on holding them.

        Returns:
            How many blocks were forgotten: none if its whole blocks are not all known, or longer sequences go on from
            them.
        """
        whole = len(tokens) // KEY_BYTES
        found = self._index.find(tokens)
        if not whole or sum(count for _, count in found) < whole:
            return 0
        node, count = found[-1]
        if node.children or count < len(node.blocks):
            return 0
        self._eviction.drop(node)
        return count

    # --- how it is done ------------------------------------------------------------------------------------------

    def _allocate(self, medium: Medium, size: int, after: Address | None = None) -> list[Address] | None:
        tier = self.tiers.get(medium)
        if tier is None:
            return None if size else []
        books = tier.allocator
        if size > books.free_blocks + books.idle_blocks:
            return None
        if size > books.free_blocks:
            self._eviction.evict(medium, size - books.free_blocks, may_drop=True)
        blocks = books.allocate(size, after.block if after is not None else None)
        return None if blocks is None else self._addresses(medium, blocks)

    def _bind(self, tokens: bytes, given: Sequence[Address]) -> list[Address]:
        """Have the index know whole blocks; where they are for it."""
        path: list[Node] = []
        attached = False
        for medium in sorted({address.medium for address in given}):
            # With what comes before in warmer media: that is in the index by now.
            blocks = [address.block for address in given if address.medium <= medium]
            done = self._index.insert(tokens[: len(blocks) * KEY_BYTES], blocks, medium)
            for node in done.bound:
                self.tiers[medium].allocator.index(node.blocks)
            for former, colder in done.unbound:
                self.tiers[former].allocator.unindex(colder)
            attached = attached or len(done.bound) > len(done.unbound)
            path = done.path
        if attached:
            self._tell(Change.INSERTED, tokens, len(tokens))
        return self._addresses_of(path)

    def _nodes_of(self, cold: Sequence[Address]) -> list[tuple[Node, int, int]]:
        """The nodes that have blocks of colder media: how many of each, and where in ``cold`` these begin.

        Raises:
            ValueError: what is before one is neither in HBM nor among them.
        """
        found: list[tuple[Node, int, int]] = []
        place = 0
        while place < len(cold):
            node = self._index.owner(cold[place].medium, cold[place].block)
            if node is None:
                place += 1
                continue
            count = 0
            while count < len(node.blocks) and place + count < len(cold):
                if (cold[place + count].medium, cold[place + count].block) != (node.medium, node.blocks[count]):
                    break
                count += 1
            parent = node.parent
            assert parent is not None
            before = parent.medium is Medium.HBM or (
                found and found[-1][0] is parent and found[-1][1] == len(parent.blocks)
            )
            if not count or not before:
                raise ValueError("blocks are swapped in from the first block of a sequence on")
            found.append((node, count, place))
            place += count
        return found

    def _dropped(self, tokens: bytes, kept_bytes: int) -> None:
        self._tell(Change.EVICTED, tokens, kept_bytes)

    def _tell(self, change: Change, tokens: bytes, kept_bytes: int) -> None:
        self._events += 1
        if self.listener is not None:
            self.listener(PoolEvent(self._events, change, tokens, kept_bytes // TOKEN_BYTES))

    def _by_medium(self, addresses: Sequence[Address]) -> dict[Medium, list[int]]:
        """Raises: WrongBlock: one means no block that is here and given out."""
        blocks: dict[Medium, list[int]] = {}
        for address in addresses:
            tier = self.tiers.get(address.medium) if address.instance == self.instance else None
            if tier is None or not tier.allocator.is_current(address.block, address.epoch):
                raise WrongBlock(f"{address} is not held")
            blocks.setdefault(address.medium, []).append(address.block)
        return blocks

    def _addresses(self, medium: Medium, blocks: Sequence[int]) -> list[Address]:
        epoch = self.tiers[medium].allocator.epoch
        return [Address(self.instance, medium, block, epoch(block)) for block in blocks]

    def _addresses_of(self, path: Sequence[Node]) -> list[Address]:
        return [address for node in path for address in self._addresses(node.medium, node.blocks)]
