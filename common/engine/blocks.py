"""The blocks of one sequence that is computed, and what is known beforehand of one that waits."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from common.mempool.address import BLOCK_TOKENS, KEY_BYTES, Address
from common.mempool.index import agreed_blocks
from common.mempool.pool import MemPool
from common.messages.chat import tokens_in
from common.models.causal_lm import BlockTable
from common.policies.language.batching_events import CachedPrefix


class SequenceBlocks:
    """What a sequence holds of the memory. ``table``: the same, as the model reads it."""

    def __init__(self, memory: MemPool, addresses: Sequence[Address] = ()) -> None:
        self._memory = memory
        self.addresses: list[Address] = []
        self.table = BlockTable()
        self._set(list(addresses))

    def share(self, tokens: bytes) -> None:
        """Hold what is there of ``tokens``, all of which is. Nothing has been evicted since that was found out."""
        self.addresses = self._memory.match(tokens, hold=True)
        if len(self.addresses) * KEY_BYTES != len(tokens):
            raise RuntimeError(f"{len(self.addresses)} blocks are there of {tokens_in(tokens)} tokens")

    def bring(self) -> None:
        """Have all of them where the model can read them."""
        warm = self._memory.swap_in(self.addresses)
        if warm is None:
            raise RuntimeError("the policy shared blocks for which there is no room")
        self._set(warm)

    def grow(self, count: int) -> None:
        """Hold so many more."""
        new = self._memory.alloc_mem(count, after=self.addresses[-1] if self.addresses else None)
        if new is None:
            raise RuntimeError(f"the policy gave out {count} blocks that are not free")
        self.addresses += new
        self.table.extend(address.block for address in new)

    def keep(self, tokens: bytes) -> None:
        """Let others find ``tokens``, which are computed. Where they were known already, these copies are given up."""
        kept = self._memory.insert(tokens, self.addresses, hold=True)
        if kept != self.addresses:
            self._set(kept)

    def release(self, tokens: bytes = b"") -> None:
        """Hold none any more; those of ``tokens`` are kept for others."""
        self._memory.insert(tokens, self.addresses)
        self._set([])

    def _set(self, addresses: list[Address]) -> None:
        self.addresses = addresses
        self.table = BlockTable(address.block for address in addresses)


class Prefixes(Mapping[str, CachedPrefix]):
    """What is in the memory of those who wait, found out when it is asked for: before one step, in the policy's order.

    Args:
        waiting: names to tokens.
        computing: the tokens of those whose prompts are being computed. Who is asked for and need not wait joins them.
    """

    def __init__(self, memory: MemPool, waiting: Callable[[str], bytes], computing: Sequence[bytes]) -> None:
        self._memory = memory
        self._waiting = waiting
        self._computing = list(computing)
        self._found: dict[str, CachedPrefix] = {}

    def __getitem__(self, name: str) -> CachedPrefix:
        if name not in self._found:
            self._found[name] = self._find(self._waiting(name))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def _find(self, tokens: bytes) -> CachedPrefix:
        # The last token is computed in any case: the next one follows from it.
        useful = tokens[:-1]
        found = self._memory.match(useful)
        rest = tokens_in(tokens) - len(found) * BLOCK_TOKENS
        coming = max((agreed_blocks(useful, other) for other in self._computing), default=0) - len(found)
        if 2 * coming * BLOCK_TOKENS >= rest:
            return CachedPrefix(awaited=True)
        self._computing.append(tokens)
        return CachedPrefix(len(found) * BLOCK_TOKENS, self._memory.held_by_others(found))
