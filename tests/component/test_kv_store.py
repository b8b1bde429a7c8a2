"""What language instances keep lies in the cache stores too: found again by whoever comes next, whoever has died since.

Real instances and cache stores; answers are transformers' own, and what was computed is counted to the token.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

from common.language.settings import KVStore
from common.mempool.address import BLOCK_TOKENS
from tests.component.gateway_support import until
from tests.component.language_support import LanguageStack, language_stack, shown
from tests.support.cache_store import cache_client, running_store
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import greedy
from tests.support.nats_server import NatsServer

PATIENCE_S = 60.0
ANSWER = 8
# Whatever it takes, however slow the machine, and of every length.
STORED: dict[str, Any] = {"kv_store": KVStore.ALWAYS, "kv_store_tokens": 1, "transfer_s": PATIENCE_S}


@cache
def prompt_of(
    folder: Path, seed: int, length: int = 4 * BLOCK_TOKENS + 5, begins: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """A prompt whose answer is not near a tie and does not end early."""
    chance = random.Random(seed)
    while True:
        prompt = begins + tuple(chance.randrange(0, 256) for _ in range(length - len(begins)))
        answer = greedy(folder, prompt, ANSWER)
        if answer.margin >= 1e-4 and len(answer.tokens) == ANSWER:
            return prompt


def whole(tokens: int) -> int:
    """Tokens, in whole blocks."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


async def said(stack: LanguageStack, folder: Path, prompt: tuple[int, ...]) -> int:
    """Have it answered; of how many of its tokens keys and values were there, as the client is told."""
    told = await stack.client.completions.create(
        model=stack.model, prompt=list(prompt), max_tokens=ANSWER, temperature=0
    )
    assert told.choices[0].text == shown(greedy(folder, prompt, ANSWER).tokens)
    assert told.usage is not None and told.usage.prompt_tokens_details is not None
    return told.usage.prompt_tokens_details.cached_tokens or 0


async def stored(watched: Watched, count: int) -> None:
    """Return once an instance has stored something of so many sequences."""
    outcomes = watched.instance.stored.storing.outcomes

    async def done() -> bool:
        return outcomes["stored"] >= count

    await until(done, deadline_s=PATIENCE_S)


async def test_a_new_instance_finds_what_another_had(nats_server: NatsServer, language_model: Path) -> None:
    url = nats_server.url
    prompt = prompt_of(language_model, 1)
    known = whole(len(prompt) - 1)
    async with (
        cache_client(url) as client,
        running_store(client, url, None),
        language_stack(url, language_model) as stack,
    ):
        async with language_instance(url, "decode-0", language_model, **STORED) as first:
            await stack.served("decode-0")
            assert await said(stack, language_model, prompt) == 0
            await stored(first, 1)
            assert first.instance.stored.finding.outcomes == {"unknown": 1}
        await stack.lost("decode-0")
        async with language_instance(url, "decode-1", language_model, **STORED) as second:
            await stack.served("decode-1")
            assert await said(stack, language_model, prompt) == known
            assert second.model.engine.counts.prefilled == len(prompt) - known
            assert second.instance.stored.finding.outcomes == {"found": 1}
            await second.settled()
