"""Keys and values of what was computed before, kept in each instance's host memory: the least that prefixes need.

Blocks by id, least recently used first out, apart from the pool that running sequences share. How such a memory really
is kept, moved and indexed is another matter; here it is enough that some instance has a prefix and others do not.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from loadgen.simulator.language.requests import ChatRequest


class History:
    """One instance's."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._kept: OrderedDict[int, None] = OrderedDict()

    def keep(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._kept.pop(block, None)
            self._kept[block] = None
        while len(self._kept) > self._blocks:
            self._kept.popitem(last=False)

    def match(self, request: ChatRequest, block_tokens: int) -> int:
        """How many of its prompt's tokens are here, from the first on; the last one is always computed."""
        blocks = 0
        for block in request.prompt_blocks:
            if block not in self._kept:
                break
            blocks += 1
        return min(blocks * block_tokens, request.prompt_tokens - 1)


class Histories:
    """Of all instances; what they have in common is the directory that routers and dispatchers ask."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._of: dict[str, History] = {}

    def add(self, instance: str) -> None:
        self._of[instance] = History(self._blocks)

    def tokens_at(self, request: ChatRequest) -> Mapping[str, int]:
        """Instances that have any of its prompt."""
        if not request.prompt_blocks:
            return {}
        found = {name: history.match(request, self._block_tokens) for name, history in self._of.items()}
        return {name: tokens for name, tokens in found.items() if tokens}

    def prefilled(self, request: ChatRequest, instance: str) -> None:
        self._of[instance].keep(request.prompt_blocks)

    def ended(self, request: ChatRequest, instance: str) -> None:
        self._of[instance].keep((*request.prompt_blocks, *request.answer_blocks))
