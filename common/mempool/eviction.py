"""How historical KV leaves a tier: the end of what was used longest ago first, to the next tier or for good.

MemServe says that evictions happen and not which; least recently used leaves are what the tree it builds on evicts.
"""

from collections.abc import Callable, Mapping

from common.mempool.address import Medium
from common.mempool.index import Node, RadixIndex
from common.mempool.tiers import Tier


class Eviction:
    """Evicts from ``tiers`` what ``index`` has. ``dropped`` is told each node that is gone, as it was before."""

    def __init__(self, index: RadixIndex, tiers: Mapping[Medium, Tier], dropped: Callable[[bytes, int], None]) -> None:
        self._index = index
        self._tiers = tiers
        self._dropped = dropped

    def evict(self, medium: Medium, count: int, may_drop: bool) -> int:
        """Have idle blocks leave a medium, at most ``count``; how many did.

        ``may_drop``: what finds no room in a colder tier is dropped. Then as many leave as are idle.
        """
        left = count
        # In the order of finding them; each once, though the index may find one twice.
        spared: dict[Node, None] = {}
        while left:
            node = self._index.pop_oldest(medium)
            if node is not None:
                gone = self._evict_end(node, left, may_drop)
                left -= gone
                if not gone:
                    spared[node] = None
            elif may_drop and spared and self._tiers[medium].allocator.idle_blocks:
                self._uncover(spared.popitem()[0])
            else:
                break
        for node in spared:
            self._index.push(node)
        return count - left

    def drop(self, node: Node) -> None:
        """Forget a node and all below it. What nobody holds is free then."""
        tokens = node.tokens
        below = [(one.medium, one.blocks) for one in node.subtree]
        self._index.remove(node)
        for medium, blocks in below:
            self._tiers[medium].allocator.unindex(blocks)
        self._dropped(tokens, len(tokens) - len(node.key))

    def _evict_end(self, node: Node, most: int, may_drop: bool) -> int:
        """Have what is idle at the end of a node leave its medium; how many blocks did."""
        idle = self._idle_end(node, most)
        if not idle:
            return 0
        colder = next((tier for medium, tier in self._tiers.items() if medium > node.medium), None)
        if colder is not None:
            free = colder.allocator.free_blocks
            if free < idle:
                self.evict(colder.medium, idle - free, may_drop=True)
            room = min(idle, colder.allocator.free_blocks)
            if room:
                self._move(self._end_of(node, room), colder)
                return room
        if not may_drop or node.children:
            return 0
        self.drop(self._end_of(node, idle))
        return idle

    def _idle_end(self, node: Node, most: int) -> int:
        is_idle = self._tiers[node.medium].allocator.is_idle
        count = 0
        while count < min(most, len(node.blocks)) and is_idle(node.blocks[-1 - count]):
            count += 1
        return count

    def _uncover(self, node: Node) -> None:
        """Forget what keeps idle blocks before it in the index though somebody holds it; its holders keep it."""
        if node.parent is None:
            # What it was the end of has been forgotten meanwhile.
            return
        if node.children:
            for child in list(node.children.values()):
                self.drop(child)
            return
        is_idle = self._tiers[node.medium].allocator.is_idle
        count = 1
        while count < len(node.blocks) and not is_idle(node.blocks[-1 - count]):
            count += 1
        self.drop(self._end_of(node, count))

    def _end_of(self, node: Node, count: int) -> Node:
        """The last ``count`` blocks of a node as a node of their own."""
        if count < len(node.blocks):
            self._index.split(node, len(node.blocks) - count)
        return node

    def _move(self, node: Node, to: Tier) -> None:
        source = self._tiers[node.medium]
        former, blocks = node.blocks, to.allocator.allocate(len(node.blocks))
        assert blocks is not None
        source.copy_to(to, former, blocks)
        self._index.relocate(node, to.medium, blocks)
        to.allocator.index(blocks)
        to.allocator.release(blocks)
        source.allocator.unindex(former)
        self._index.join(node)
