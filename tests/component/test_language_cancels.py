"""Clients that leave at any moment: no block is leaked, no stream hangs, and who stays has the greedy answer.

``TRIPTYCH_TEST_CANCELS`` says how many requests there are in each test.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from common.language.settings import TransferMode
from common.policies.language.decode_admission import AdmissionRule
from common.policies.language.decode_dispatch import DispatchRule
from common.policies.language.prefill_schedule import PrefillOrder
from tests.component.chat_support import DECODE, PREFILL
from tests.component.gateway_support import until
from tests.component.language_support import LanguageStack, known_prompts, language_stack, shown
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer

REQUESTS = int(os.environ.get("TRIPTYCH_TEST_CANCELS", "60"))
AT_ONCE = 20
LEAVING = 0.6
# Room for a few sequences only: others wait, are preempted, or find no room where they are to go on.
POOL = 40 * BLOCK_BYTES
ANSWER = 48
PATIENCE_S = 120.0
# Some of the modes with rules other than those that are used unless one asks for others.
_RULES: dict[str, dict[str, Any]] = {
    "by_request": {"prefill_order": PrefillOrder.SJF, "decode_admission": AdmissionRule.RESERVE_DYNAMIC},
    "by_layer": {"prefill_order": PrefillOrder.SRF, "decode_admission": AdmissionRule.RESERVE_STATIC},
}


@pytest.mark.parametrize(
    ("mode", "dispatch"),
    [
        ("fused", "scheduler"),
        (TransferMode.BY_CHUNK, "scheduler"),
        (TransferMode.BY_REQUEST, DispatchRule.POWER_OF_TWO),
        (TransferMode.BY_LAYER, DispatchRule.POWER_OF_TWO),
    ],
)
async def test_the_books_balance_whoever_leaves(
    nats_server: NatsServer, language_model: Path, mode: str, dispatch: str
) -> None:
    url, folder = nats_server.url, language_model
    rules = _RULES.get(mode, {})
    async with contextlib.AsyncExitStack() as opened:
        stack = await opened.enter_async_context(language_stack(url, folder, dispatch))
        if mode == "fused":
            only = language_instance(url, "decode-0", folder, chunk_tokens=32, kv_bytes=POOL)
            instances = [await opened.enter_async_context(only)]
            await stack.served("decode-0")
        else:
            first = language_instance(
                url, "prefill-0", folder, PREFILL, chunk_tokens=32, kv_bytes=POOL, transfer_mode=mode, **rules
            )
            second = language_instance(url, "decode-0", folder, DECODE, kv_bytes=POOL, **rules)
            instances = [await opened.enter_async_context(one) for one in (first, second)]
            await stack.served("prefill-0", "decode-0")
        stayed = await _visited(stack, folder)
        assert 0 < stayed < REQUESTS
        await until(_idle(stack, instances), deadline_s=PATIENCE_S)
        for watched in instances:
            # Nobody is awaited any more, or it would be asked to wait for that one.
            assert watched.model.engine.refusal(1, 10_000) is None


def _idle(stack: LanguageStack, instances: list[Watched]) -> Callable[[], Awaitable[bool]]:
    async def idle() -> bool:
        assert stack.gateway.edge.language is not None
        books = [watched.books for watched in instances]
        return (
            stack.gateway.edge.language.active == 0
            and all(one.free_blocks + one.idle_blocks == one.blocks for one in books)
            and not any(watched.model.engine.busy for watched in instances)
        )

    return idle


async def _visited(stack: LanguageStack, folder: Path) -> int:
    """Have so many clients come, ``AT_ONCE`` of them at a time; how many of them stayed to the end."""
    chance = random.Random(REQUESTS)
    prompts = known_prompts(folder)
    room = asyncio.Semaphore(AT_ONCE)
    loop = asyncio.get_running_loop()
    # How long an answer takes now, so that those who leave do so in every phase of it.
    lasting_s = 0.2

    async def client() -> bool:
        nonlocal lasting_s
        async with room:
            prompt = chance.choice(list(prompts))
            began_s = loop.time()
            asking = asyncio.create_task(stack.text(prompt, ANSWER))
            if chance.random() < LEAVING:
                await asyncio.wait((asking,), timeout=chance.uniform(0.0, lasting_s))
                asking.cancel()
            try:
                text = await asking
            except asyncio.CancelledError:
                return False
            lasting_s += (loop.time() - began_s - lasting_s) / 8
            assert text == shown(prompts[prompt][:ANSWER])
            return True

    async with asyncio.timeout(PATIENCE_S + REQUESTS):
        return sum(await asyncio.gather(*(client() for _ in range(REQUESTS))))
