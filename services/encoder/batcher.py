"""Prompts that wait are encoded together; those seen lately are not encoded again."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import torch

Encode = Callable[[list[str]], Awaitable[Sequence[torch.Tensor]]]


class PromptBatcher:
    """Collects prompts while the model is busy, and encodes what has come together in one batch.

    Args:
        encode: encodes up to ``max_batch`` prompts at once, each to [tokens, channels].
        remembered: how many results are kept, least recently used dropped first.
    """

    def __init__(self, encode: Encode, max_batch: int, remembered: int) -> None:
        self._encode = encode
        self._max_batch = max_batch
        self._remembered = remembered
        self._results: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[torch.Tensor]] = {}
        self._asked = asyncio.Event()
        self.batches = 0

    @property
    def idle(self) -> bool:
        return not self._waiting

    def remembers(self, prompt: str) -> bool:
        """Whether the prompt's embeddings are known already."""
        return prompt in self._results

    async def encoded(self, prompt: str) -> torch.Tensor:
        """The prompt's embeddings [tokens, channels]; shared, not to be written to."""
        known = self._results.get(prompt)
        if known is not None:
            self._results.move_to_end(prompt)
            return known
        future = self._waiting.get(prompt)
        if future is None:
            future = self._waiting[prompt] = asyncio.get_running_loop().create_future()
            self._asked.set()
        # One asker that gives up must not take the others' result along.
        return await asyncio.shield(future)

    async def run(self) -> None:
        """Encode batch after batch; runs until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._waiting:
                await self._encode_some(list(self._waiting)[: self._max_batch])

    async def _encode_some(self, prompts: list[str]) -> None:
        try:
            results = await self._encode(prompts)
        except (RuntimeError, ValueError) as error:
            for prompt in prompts:
                self._settle(prompt).set_exception(error)
            return
        self.batches += 1
        for prompt, result in zip(prompts, results, strict=True):
            self._results[prompt] = result
            future = self._settle(prompt)
            if not future.done():
                future.set_result(result)
        while len(self._results) > self._remembered:
            self._results.popitem(last=False)

    def _settle(self, prompt: str) -> asyncio.Future[torch.Tensor]:
        return self._waiting.pop(prompt)
