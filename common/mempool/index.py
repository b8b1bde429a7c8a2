"""The index of historical KV: a radix tree over whole blocks of packed tokens.

MemServe, section 4: keys are token ids, granularity is the block, a value may point to any medium. Ours beyond that: a
node is in one medium, and nothing below it is in a warmer one, for what is evicted from a medium is always the end of
what it has of a sequence. Nodes carry the time of their last use, by a clock that counts uses, so that the same calls
always evict the same blocks. Who holds a block is the allocator's to know, not the tree's.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.mempool.address import KEY_BYTES, Medium


def agreed_blocks(some: bytes, others: bytes, start: int = 0) -> int:
    """With how many whole blocks of tokens ``others`` goes on from its byte ``start`` on as ``some`` begins."""
    low, high = 0, min(len(some), len(others) - start) // KEY_BYTES
    if others.startswith(some[: high * KEY_BYTES], start):
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if others.startswith(some[: middle * KEY_BYTES], start):
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True, eq=False)
class Node:
    """A run of blocks that only have one way to go on, all in one medium.

    Attributes:
        key: their tokens.
        children: by the tokens of their first block.
        last_use: of all its blocks.
    """

    key: bytes
    blocks: list[int]
    medium: Medium
    parent: "Node | None"
    last_use: int = 0
    children: dict[bytes, "Node"] = field(default_factory=dict)

    @property
    def ends_medium(self) -> bool:
        """Whether nothing below it is in the same medium."""
        return all(child.medium != self.medium for child in self.children.values())

    @property
    def tokens(self) -> bytes:
        """All tokens from the root to its end."""
        keys = []
        node: Node | None = self
        while node is not None:
            keys.append(node.key)
            node = node.parent
        return b"".join(reversed(keys))

    @property
    def subtree(self) -> "Iterator[Node]":
        """Itself and all below it."""
        left = [self]
        while left:
            node = left.pop()
            left += node.children.values()
            yield node


@dataclass(frozen=True, slots=True)
class Inserted:
    """What became of an insertion. ``bound``: nodes whose blocks the index has now; ``unbound``: what it had before
    in a colder medium, as (medium, blocks). ``path``: all nodes of the sequence in order."""

    path: list[Node]
    bound: list[Node]
    unbound: list[tuple[Medium, list[int]]]


class RadixIndex:
    """Whole blocks of tokens to where their keys and values are."""

    def __init__(self) -> None:
        self._root = Node(b"", [], Medium.HBM, None)
        self._owners: dict[Medium, dict[int, Node]] = {medium: {} for medium in Medium}
        self._oldest: dict[Medium, list[tuple[int, int, Node]]] = {medium: [] for medium in Medium}
        self._uses = itertools.count(1)
        self._pushes = itertools.count()

    @property
    def nodes(self) -> Iterator[Node]:
        return (node for node in self._root.subtree if node.parent is not None)

    def owner(self, medium: Medium, block: int) -> Node | None:
        """The node that has the block."""
        return self._owners[medium].get(block)

    def find(self, tokens: bytes) -> list[tuple[Node, int]]:
        """The longest known beginning of ``tokens``: nodes in order, and how many blocks of each. Changes nothing."""
        found: list[tuple[Node, int]] = []
        node, place = self._root, 0
        while (child := node.children.get(tokens[place : place + KEY_BYTES])) is not None:
            count = agreed_blocks(child.key, tokens, place)
            found.append((child, count))
            if count < len(child.blocks):
                break
            node, place = child, place + len(child.key)
        return found

    def use(self, tokens: bytes) -> list[Node]:
        """The longest known beginning as whole nodes, which are in use from now on."""
        now = next(self._uses)
        path = [self.split(node, count) for node, count in self.find(tokens)]
        for node in path:
            node.last_use = now
        return path

    def insert(self, tokens: bytes, blocks: Sequence[int], medium: Medium) -> Inserted:
        """Bind whole blocks of tokens to blocks of one medium.

        What is known already stays where it is, unless it is in a colder medium.
        """
        now = next(self._uses)
        done = Inserted([], [], [])
        node, place = self._root, 0
        while place < len(tokens):
            child = node.children.get(tokens[place : place + KEY_BYTES])
            first = place // KEY_BYTES
            if child is None:
                child = self._attach(node, tokens[place:], list(blocks[first:]), medium, now)
                done.bound.append(child)
            else:
                child = self.split(child, agreed_blocks(child.key, tokens, place))
                child.last_use = now
                if medium < child.medium:
                    done.unbound.append((child.medium, child.blocks))
                    self.relocate(child, medium, list(blocks[first : first + len(child.blocks)]))
                    done.bound.append(child)
            done.path.append(child)
            node, place = child, place + len(child.key)
        return done

    def split(self, node: Node, count: int) -> Node:
        """Make the first ``count`` blocks of a node a node of their own; returns it."""
        if count == len(node.blocks):
            return node
        head = Node(node.key[: count * KEY_BYTES], node.blocks[:count], node.medium, node.parent, node.last_use)
        assert node.parent is not None
        node.parent.children[head.key[:KEY_BYTES]] = head
        node.key, node.blocks, node.parent = node.key[len(head.key) :], node.blocks[count:], head
        head.children[node.key[:KEY_BYTES]] = node
        self._own(head)
        return head

    def relocate(self, node: Node, medium: Medium, blocks: list[int]) -> None:
        """The blocks of a node are elsewhere now."""
        self._disown(node)
        node.medium, node.blocks = medium, blocks
        self._own(node)
        self.push(node)
        if node.parent is not None:
            self.push(node.parent)

    def join(self, node: Node) -> None:
        """Make a node and its only child one, where they are in one medium and were never used apart."""
        if len(node.children) != 1:
            return
        (child,) = node.children.values()
        if child.medium is node.medium and child.last_use == node.last_use:
            node.key += child.key
            node.blocks += child.blocks
            node.children = child.children
            for grandchild in node.children.values():
                grandchild.parent = node
            child.parent = None
            self._own(node)
            self.push(node)

    def remove(self, node: Node) -> None:
        """Forget a node and all below it."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[:KEY_BYTES]]
        for one in node.subtree:
            self._disown(one)
            one.parent = None
        self.push(parent)

    def pop_oldest(self, medium: Medium) -> Node | None:
        """Of the nodes that end what a medium has of some sequence, the one used longest ago; ``push`` it back."""
        heap = self._oldest[medium]
        while heap:
            used, _, node = heapq.heappop(heap)
            if node.parent is None or node.medium is not medium or not node.ends_medium:
                continue
            if node.last_use == used:
                return node
            self.push(node)
        return None

    def push(self, node: Node) -> None:
        """Have a node be found by ``pop_oldest`` if it ends what its medium has."""
        if node.parent is not None and node.ends_medium:
            heapq.heappush(self._oldest[node.medium], (node.last_use, next(self._pushes), node))

    def _attach(self, parent: Node, key: bytes, blocks: list[int], medium: Medium, now: int) -> Node:
        node = Node(key, blocks, medium, parent, now)
        parent.children[key[:KEY_BYTES]] = node
        self._own(node)
        self.push(node)
        return node

    def _own(self, node: Node) -> None:
        self._owners[node.medium].update(dict.fromkeys(node.blocks, node))

    def _disown(self, node: Node) -> None:
        owners = self._owners[node.medium]
        for block in node.blocks:
            del owners[block]
