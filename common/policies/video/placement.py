"""Which slots are free, server by server, and which of them make a good group.

Groups are aligned blocks of a power of two of a server's slots, as in a buddy allocator: few different member sets then
occur, so that their communication groups can be kept ready (as DDiT needs; how its authors did it is not
known). A group never spans servers. What cannot be had aligned is taken from any free slots of one server.

A server's free slots are the bits of one integer, so that every question below is a handful of shifts; servers are kept
by the largest block they have, also as bits, so that none has to be searched for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(slots=True, eq=False)
class Server:
    """The slots of one machine; bit i of ``free`` stands for slot number ``first + i``."""

    index: int
    first: int
    span: int = 0
    slots: int = 0
    free: int = 0
    aligned_order: int = -1
    count_order: int = -1

    def resize(self, first: int, span: int) -> None:
        self.free <<= self.first - first
        self.first, self.span = first, span


class Placement:
    """The free slots of all servers. ``freed_servers`` has a bit for each server in which slots became free."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.server_of: dict[int, Server] = {}
        self.free = 0
        self.free_count = 0
        self.freed_servers = 0
        # The most slots that any server has.
        self.largest_server = 0
        self._by_name: dict[str, Server] = {}
        # By order: the servers whose largest aligned block, or whose number of free slots, is of that order.
        self._by_aligned: list[int] = []
        self._by_count: list[int] = []

    def join(self, number: int, server: str) -> None:
        """The slot stands in this server; it is not free yet. A slot that is known already stays where it is."""
        if number in self.server_of:
            return
        place = self._by_name.get(server)
        if place is None:
            place = self._by_name[server] = Server(len(self.servers), number)
            self.servers.append(place)
        first = min(place.first, number)
        last = max(place.first + place.span, number + 1)
        place.resize(first, last - first)
        while len(self._by_count) <= place.span.bit_length():
            self._by_count.append(0)
            self._by_aligned.append(0)
        self.server_of[number] = place
        place.slots += 1
        self.largest_server = max(self.largest_server, place.slots)
        self._refile(place)

    def put(self, numbers: Sequence[int]) -> None:
        """These slots, all of one server, are free now."""
        server = self.server_of[numbers[0]]
        mask = mask_of(numbers)
        self.free |= mask
        server.free |= mask >> server.first
        self.free_count += len(numbers)
        self.freed_servers |= 1 << server.index
        self._refile(server)

    def take(self, numbers: Sequence[int]) -> None:
        """These slots, all of one server, are free no longer."""
        server = self.server_of[numbers[0]]
        mask = mask_of(numbers)
        self.free &= ~mask
        server.free &= ~(mask >> server.first)
        self.free_count -= len(numbers)
        self._refile(server)

    def is_free(self, number: int) -> bool:
        return bool(self.free >> number & 1)

    def free_slots(self) -> list[int]:
        """All free slots, lowest number first."""
        return list(bits(self.free))

    def lowest(self) -> int | None:
        """The free slot with the lowest number."""
        return (self.free & -self.free).bit_length() - 1 if self.free else None

    def largest(self, limit: int) -> int:
        """The largest power of two, at most ``limit``, of slots that are free inside one server; 0 if none is."""
        for order in range(len(self._by_count) - 1, -1, -1):
            if self._by_count[order]:
                return min(1 << order, power_of_two_within(limit))
        return 0

    def block(self, size: int) -> tuple[int, ...] | None:
        """A group of ``size`` (a power of two) free slots of one server: aligned if there is one, else any.

        The smallest sufficient gap is taken, so that large ones stay whole; of equal ones that with the lowest numbers.
        """
        order = size.bit_length() - 1
        for at in range(order, len(self._by_aligned)):
            if self._by_aligned[at]:
                server = self.servers[_lowest_bit(self._by_aligned[at])]
                start = server.first + next(start for had, start in fragments(server.free) if had >= order)
                return tuple(range(start, start + size))
        for at in range(order, len(self._by_count)):
            if self._by_count[at]:
                return self._pieces(self.servers[_lowest_bit(self._by_count[at])], size)
        return None

    def growth(self, held: Sequence[int], limit: int) -> tuple[int, ...]:
        """The slots to add so that the group ``held`` becomes the largest power of two up to ``limit``.

        Its buddy block where that is free, else any free slots of its server; nothing if it cannot be doubled.
        """
        server = self.server_of[held[0]]
        size = power_of_two_within(min(limit, len(held) + server.free.bit_count()))
        if size <= len(held):
            return ()
        own = mask_of(held) >> server.first
        position = (held[0] - server.first) & -size
        block = ((1 << size) - 1) << position
        if not own & ~block and not block & ~(own | server.free):
            start = server.first + position
            return tuple(number for number in range(start, start + size) if not own >> (number - server.first) & 1)
        return self._pieces(server, size - len(held))

    def _pieces(self, server: Server, count: int) -> tuple[int, ...]:
        """Any ``count`` free slots of the server: out of the smallest gap that has enough, else the largest gaps."""
        gaps = list(fragments(server.free))
        pieces: list[int] = []
        while len(pieces) < count:
            missing = count - len(pieces)
            order, start = next((gap for gap in gaps if 1 << gap[0] >= missing), gaps[-1])
            gaps.remove((order, start))
            pieces += range(server.first + start, server.first + start + min(missing, 1 << order))
        return tuple(sorted(pieces))

    def _refile(self, server: Server) -> None:
        bit = 1 << server.index
        count_order = server.free.bit_count().bit_length() - 1
        gaps = fragments(server.free)
        order = gaps[-1][0] if gaps else -1
        if count_order != server.count_order:
            if server.count_order >= 0:
                self._by_count[server.count_order] ^= bit
            if count_order >= 0:
                self._by_count[count_order] ^= bit
            server.count_order = count_order
        if order != server.aligned_order:
            if server.aligned_order >= 0:
                self._by_aligned[server.aligned_order] ^= bit
            if order >= 0:
                self._by_aligned[order] ^= bit
            server.aligned_order = order


@lru_cache(maxsize=4096)
def fragments(free: int) -> tuple[tuple[int, int], ...]:
    """(order, start bit) of the free aligned blocks that are not part of a larger free one, smallest first.

    Servers of few slots come to the same few sets of free ones again and again, so that the answers are kept.
    """
    found = []
    order, starts = 0, free
    while starts:
        size = 1 << order
        # Two blocks side by side make a larger one if the first starts at a multiple of its size.
        whole = sum(1 << start for start in bits(starts & starts >> size) if start % (2 * size) == 0)
        found += [(order, start) for start in bits(starts & ~(whole | whole << size))]
        order, starts = order + 1, whole
    return tuple(found)


def power_of_two_within(most: int) -> int:
    """The largest power of two that is at most ``most``; 0 below 1."""
    return 1 << (most.bit_length() - 1) if most > 0 else 0


def bits(mask: int) -> Iterable[int]:
    """The positions of the bits that are set, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def mask_of(positions: Iterable[int]) -> int:
    """The bits at these positions."""
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


def _lowest_bit(mask: int) -> int:
    return (mask & -mask).bit_length() - 1
