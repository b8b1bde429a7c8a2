"""The global prompt tree: which instance has the keys and values of which beginning of a prompt.

MemServe (arXiv 2406.17565), sections 5.2 and 6: a radix tree over whole blocks of token ids, whose nodes name the
instances that hold them. Ours: the tokens stay the packed bytes that they came as, so a run of blocks without a branch
is one edge and is compared in one call, whatever its length; nothing is hashed to find a match. Instances of all kinds
are in one tree, so that one walk answers for all of them; a node's holders are the bits of an integer.

What holds a block holds all that is before it, so holders only grow fewer from the root on.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

_NO_CHILDREN: dict[bytes, "_Node"] = {}
# Python's own hash of a whole number is its rest by this prime (2^61 - 1), and faster than the division. Powers of two
# come again after 61.
_PRIME = sys.hash_info.modulus
_PERIOD = _PRIME.bit_length()


@dataclass(frozen=True, slots=True)
class Holding:
    """What one instance has. Two trees that agree on it hold the same, however they were told.

    Attributes:
        blocks: how many.
        digest: the sum over them of each one's tokens as a number, at its place in the sequence, modulo a prime. It
            does not tell of which sequence a block is the third, say; where trees part, they do so in a block.
    """

    blocks: int = 0
    digest: int = 0


class _Node:
    """Blocks in a row that all have the same holders. ``names``: of its holders, made when first asked for.

    ``fresh``: the holders that were inserted since the last ``expire``.
    """

    __slots__ = ("children", "edge", "fresh", "holders", "names")

    def __init__(self, edge: bytes, holders: int, fresh: int, children: dict[bytes, "_Node"]) -> None:
        self.edge = edge
        self.holders = holders
        self.fresh = fresh
        self.children = children
        self.names: tuple[str, ...] | None = None

    def set_holders(self, holders: int) -> None:
        self.holders = holders
        self.names = None


class PromptTree:
    """Packed tokens in, blocks by instance out.

    Args:
        block_bytes: of the packed tokens of one block. What is beyond the last whole block is not looked at.
    """

    def __init__(self, block_bytes: int) -> None:
        if block_bytes < 1:
            raise ValueError(f"a block of {block_bytes} bytes holds no token")
        self.block_bytes = block_bytes
        self._root = _Node(b"", 0, 0, {})
        self._places: dict[str, int] = {}
        self._names: list[str] = []
        self._unused: list[int] = []
        self._blocks: list[int] = []
        self._digests: list[int] = []

    def match(self, tokens: bytes) -> dict[str, int]:
        """How many blocks of the beginning of ``tokens`` each instance has; those that have none are left out."""
        block = self.block_bytes
        scores: dict[str, int] = {}
        children, place = self._root.children, 0
        while (child := children.get(tokens[place : place + block])) is not None:
            edge = child.edge
            whole = tokens.startswith(edge, place)
            place += len(edge) if whole else agreed_bytes(edge, tokens, place, block)
            scores.update(dict.fromkeys(child.names or self._name_holders(child), place // block))
            if not whole:
                break
            children = child.children
        return scores

    def insert(self, instance: str, tokens: bytes) -> None:
        """The instance has all whole blocks of ``tokens`` from now on."""
        block = self.block_bytes
        bit = 1 << self._place_of(instance)
        end = len(tokens) - len(tokens) % block
        node, place = self._root, 0
        while place < end:
            child = node.children.get(tokens[place : place + block])
            if child is None:
                self._append(node, tokens[place:end], bit)
                self._count(bit, tokens[place:end], place, 1)
                return
            if not tokens.startswith(child.edge, place) or place + len(child.edge) > end:
                child = self._split(node, child, agreed_bytes(child.edge, tokens, place, block))
            if not child.holders & bit:
                child.set_holders(child.holders | bit)
                self._count(bit, child.edge, place, 1)
            child.fresh |= bit
            place += len(child.edge)
            node = child

    def remove(self, instance: str, tokens: bytes, kept_blocks: int) -> None:
        """Of ``tokens`` the instance has no more than the first blocks, and nothing of what else begins with the next.

        Args:
            kept_blocks: how many it keeps, fewer than ``tokens`` has.
        """
        place = self._places.get(instance)
        if place is None:
            return
        keep = kept_blocks * self.block_bytes
        path, child = self._find(tokens, keep)
        if child is not None:
            self._clear(path[-1], child, 1 << place, keep)
            self._tidy(path)

    def forget(self, instance: str) -> None:
        """The instance has nothing any more."""
        place = self._places.pop(instance, None)
        if place is None:
            return
        for child in list(self._root.children.values()):
            self._clear(self._root, child, 1 << place, 0)
        self._blocks[place] = self._digests[place] = 0
        self._unused.append(place)

    def expire(self) -> None:
        """Forget whatever was not inserted again since the last call, of all instances (MemServe's TTL)."""
        left = [(self._root, child, 0) for child in self._root.children.values()]
        while left:
            above, one, place = left.pop()
            stale = one.holders & ~one.fresh
            while stale:
                bit = stale & -stale
                self._clear(above, one, bit, place)
                stale ^= bit
            one.fresh = 0
            place += len(one.edge)
            left += [(one, child, place) for child in one.children.values()]

    def holding(self, instance: str) -> Holding:
        """What the instance has, as numbers."""
        place = self._places.get(instance)
        return Holding() if place is None else Holding(self._blocks[place], self._digests[place])

    def sequences(self, instance: str) -> Iterator[bytes]:
        """The longest sequences that the instance has; together they are all it has."""
        place = self._places.get(instance)
        if place is None:
            return
        bit, left = 1 << place, [(self._root, b"")]
        while left:
            node, before = left.pop()
            below = [(child, before + child.edge) for child in node.children.values() if child.holders & bit]
            if not below and before:
                yield before
            left += below

    @property
    def nodes(self) -> int:
        """How many edges there are."""
        left, count = list(self._root.children.values()), 0
        while left:
            node = left.pop()
            count += 1
            left += node.children.values()
        return count

    # --- the tree ------------------------------------------------------------------------------------------------

    def _append(self, node: _Node, edge: bytes, bit: int) -> None:
        """Let new blocks follow a node: as one edge with it where nothing else follows and nobody else is there."""
        if node is not self._root and not node.children and node.holders == bit:
            node.edge += edge
            return
        if node.children is _NO_CHILDREN:
            node.children = {}
        node.children[edge[: self.block_bytes]] = _Node(edge, bit, bit, _NO_CHILDREN)

    def _split(self, parent: _Node, node: _Node, place: int) -> _Node:
        """Make the first bytes of a node a node of their own, before it; returns that."""
        head = _Node(node.edge[:place], node.holders, node.fresh, {})
        node.edge = node.edge[place:]
        head.children[node.edge[: self.block_bytes]] = node
        parent.children[head.edge[: self.block_bytes]] = head
        return head

    def _find(self, tokens: bytes, keep: int) -> tuple[list[_Node], _Node | None]:
        """The nodes of the first bytes, and the one that goes on with ``tokens`` where they end, if there is one."""
        block = self.block_bytes
        path, place = [self._root], 0
        while (child := path[-1].children.get(tokens[place : place + block])) is not None and place < keep:
            if not tokens.startswith(child.edge, place) or place + len(child.edge) > keep:
                if place + agreed_bytes(child.edge, tokens, place, block) <= keep:
                    return path, None
                child = self._split(path[-1], child, keep - place)
            place += len(child.edge)
            path.append(child)
        return path, child

    def _clear(self, parent: _Node, node: _Node, bit: int, place: int) -> None:
        """Take a holder from a node and all below it; what nobody holds is gone. ``place``: its first byte."""
        left = [(parent, node, place)]
        while left:
            above, one, begin = left.pop()
            if not one.holders & bit:
                continue
            self._count(bit, one.edge, begin, -1)
            one.set_holders(one.holders & ~bit)
            one.fresh &= ~bit
            left += [(one, child, begin + len(one.edge)) for child in one.children.values()]
            if not one.holders:
                del above.children[one.edge[: self.block_bytes]]

    def _tidy(self, path: list[_Node]) -> None:
        """Make one of the last node of a path and what alone follows it, where the holders are the same."""
        node = path[-1]
        if len(path) > 1 and len(node.children) == 1:
            (child,) = node.children.values()
            if child.holders == node.holders and child.fresh == node.fresh:
                node.edge += child.edge
                node.children = child.children

    # --- the holders ---------------------------------------------------------------------------------------------

    def _place_of(self, instance: str) -> int:
        place = self._places.get(instance)
        if place is None:
            if self._unused:
                place = self._unused.pop()
                self._names[place] = instance
            else:
                place = len(self._names)
                self._names.append(instance)
                self._blocks.append(0)
                self._digests.append(0)
            self._places[instance] = place
        return place

    def _name_holders(self, node: _Node) -> tuple[str, ...]:
        names, bits = [], node.holders
        while bits:
            bit = bits & -bits
            names.append(self._names[bit.bit_length() - 1])
            bits ^= bit
        node.names = tuple(names)
        return node.names

    def _count(self, bit: int, edge: bytes, place: int, sign: int) -> None:
        """Blocks come to a holder (1) or leave it (-1). ``place``: of their first byte in the sequence."""
        holder = bit.bit_length() - 1
        number = hash(int.from_bytes(edge, "little")) << (8 * place % _PERIOD)
        self._blocks[holder] += sign * (len(edge) // self.block_bytes)
        self._digests[holder] = (self._digests[holder] + sign * number) % _PRIME


def agreed_bytes(edge: bytes, tokens: bytes, place: int, block: int) -> int:
    """How many bytes of whole blocks ``tokens`` goes on with from ``place`` as ``edge`` begins."""
    low, high = 0, min(len(edge), len(tokens) - place) // block
    if tokens.startswith(edge[: high * block], place):
        return high * block
    while low + 1 < high:
        middle = (low + high) // 2
        if tokens.startswith(edge[low * block : middle * block], place + low * block):
            low = middle
        else:
            high = middle
    return low * block
