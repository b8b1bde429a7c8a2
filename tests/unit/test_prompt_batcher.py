"""The encoder's batcher: what waits is encoded together, what is known is not encoded again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
import torch

from services.encoder.batcher import PromptBatcher


class Encoding:
    """Encodes by length, when the test lets it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, prompts: list[str]) -> Sequence[torch.Tensor]:
        self.batches.append(list(prompts))
        await self.gate.wait()
        if "bad" in prompts:
            raise RuntimeError("out of memory")
        return [torch.full((1, 2), float(len(prompt))) for prompt in prompts]


@contextlib.asynccontextmanager
async def batcher(encoding: Encoding, remembered: int = 100) -> AsyncIterator[PromptBatcher]:
    subject = PromptBatcher(encoding, max_batch=2, remembered=remembered)
    running = asyncio.create_task(subject.run())
    try:
        yield subject
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_what_comes_while_the_model_is_busy_is_encoded_together() -> None:
    encoding = Encoding()
    encoding.gate.clear()
    async with batcher(encoding) as subject:
        asked = [asyncio.create_task(subject.encoded(prompt)) for prompt in ("a", "bb", "ccc", "bb")]
        await asyncio.sleep(0)
        encoding.gate.set()
        results = await asyncio.wait_for(asyncio.gather(*asked), 5.0)
    assert [float(result[0, 0]) for result in results] == [1.0, 2.0, 3.0, 2.0]
    assert encoding.batches == [["a", "bb"], ["ccc"]]
    assert subject.idle


async def test_a_known_prompt_is_not_encoded_again_until_it_is_the_least_recently_used() -> None:
    encoding = Encoding()
    async with batcher(encoding, remembered=2) as subject:
        for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
            await asyncio.wait_for(subject.encoded(prompt), 5.0)
    assert encoding.batches == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert [subject.remembers(prompt) for prompt in ("a", "bb", "ccc")] == [True, True, False]


async def test_a_failed_batch_fails_its_askers_and_nobody_else() -> None:
    encoding = Encoding()
    async with batcher(encoding) as subject:
        with pytest.raises(RuntimeError, match="out of memory"):
            await asyncio.wait_for(subject.encoded("bad"), 5.0)
        assert float((await asyncio.wait_for(subject.encoded("fine"), 5.0))[0, 0]) == 4.0
    assert subject.idle


async def test_an_asker_that_gives_up_does_not_take_the_others_result_along() -> None:
    encoding = Encoding()
    encoding.gate.clear()
    async with batcher(encoding) as subject:
        leaving = asyncio.create_task(subject.encoded("a"))
        staying = asyncio.create_task(subject.encoded("a"))
        await asyncio.sleep(0)
        leaving.cancel()
        encoding.gate.set()
        assert float((await asyncio.wait_for(staying, 5.0))[0, 0]) == 1.0
        assert leaving.cancelled()


async def test_a_batch_whose_askers_have_all_left_harms_nobody() -> None:
    encoding = Encoding()
    encoding.gate.clear()
    async with batcher(encoding) as subject:
        leaving = asyncio.create_task(subject.encoded("bad"))
        await asyncio.sleep(0)
        leaving.cancel()
        encoding.gate.set()
        assert float((await asyncio.wait_for(subject.encoded("fine"), 5.0))[0, 0]) == 4.0
