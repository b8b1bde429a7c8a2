"""What real instances have cached, from their pools over the bus to a scheduler's view."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.bus.nats_bus import NatsBus
from common.mempool.address import BLOCK_TOKENS
from common.messages.chat import pack_tokens
from common.messages.kv_index import AskIndex, AskView, IndexTold, InstanceViewed, ViewTold
from common.messages.subjects import TELL_INDEX, TELL_VIEW
from loadgen.bench.index_agreement import agreement
from loadgen.bench.process import BenchmarkError
from services.scheduler.prompt_view import PromptView
from tests.component.language_support import known_prompts, language_stack, shown
from tests.support.bus import eventually
from tests.support.language_instance import language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer


@contextlib.asynccontextmanager
async def viewing(url: str) -> AsyncIterator[PromptView]:
    async with await NatsBus.connect(url, name="view") as bus:
        view = PromptView(bus)
        view.follow("decode-0")
        async with view.running():
            yield view


async def knows(view: PromptView, prompt: tuple[int, ...]) -> None:
    """Return once the view has all whole blocks of a prompt at the instance."""
    cached = {"decode-0": len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS}
    await eventually(lambda: view.cached(pack_tokens(prompt)) == cached, deadline_s=60.0)


async def test_a_view_follows_an_instance_and_one_that_comes_later_learns_all_of_it(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    long = [prompt for prompt in prompts if len(prompt) >= 2 * BLOCK_TOKENS]
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model),
        viewing(nats_server.url) as early,
    ):
        await stack.served("decode-0")
        for prompt in long:
            assert await stack.text(prompt, 4) == shown(prompts[prompt][:4])
            await knows(early, prompt)
        async with viewing(nats_server.url) as late:
            for prompt in long:
                await knows(late, prompt)
            async with await NatsBus.connect(nats_server.url, name="asking") as bus:
                agreed = await agreement(bus, ["decode-0"], deadline_s=60.0)
            assert agreed["decode-0"] >= sum(len(prompt) // BLOCK_TOKENS for prompt in long)
            late.forget("decode-0")
            assert late.cached(pack_tokens(long[0])) == {}


async def test_what_was_evicted_is_not_in_the_view(nats_server: NatsServer, language_model: Path) -> None:
    prompts = known_prompts(language_model)
    first, *others = [prompt for prompt in prompts if len(prompt) >= 2 * BLOCK_TOKENS]
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, kv_bytes=8 * BLOCK_BYTES) as served,
        viewing(nats_server.url) as view,
    ):
        await stack.served("decode-0")
        for prompt in (first, *others):
            assert await stack.text(prompt, 16) == shown(prompts[prompt][:16])
        assert served.model.engine.memory.match(pack_tokens(first)) == []
        await knows(view, others[-1])
        assert view.cached(pack_tokens(first)) == {}


async def test_an_instance_that_has_less_now_than_it_began_to_tell_is_asked_anew(nats_server: NatsServer) -> None:
    """Somebody else has asked it meanwhile, or it is in another life. It is played."""
    asked: list[int] = []
    before = IndexTold(instance="decode-0", incarnation=1, number=2, part=0, parts=4, sequences=(), blocks=9, digest=9)
    now = IndexTold(instance="decode-0", incarnation=2, number=0, part=0, parts=1, sequences=(), blocks=0, digest=0)

    async def index(ask: AskIndex) -> IndexTold:
        asked.append(ask.part)
        return before if len(asked) == 1 else now

    async with await NatsBus.connect(nats_server.url, name="decode-0") as bus:
        await bus.serve(TELL_INDEX, index, "decode-0")
        async with viewing(nats_server.url):
            await eventually(lambda: asked.count(0) == 2)
    assert len(asked) < 10


async def test_disagreement_is_told_with_both_sides(nats_server: NatsServer) -> None:
    viewed = InstanceViewed(instance="decode-0", incarnation=1, number=2, awaited=False, blocks=3, digest=4)
    told = IndexTold(instance="decode-0", incarnation=1, number=2, part=0, parts=1, sequences=(), blocks=3, digest=5)

    async def view(_: AskView) -> ViewTold:
        return ViewTold(instances=(viewed,))

    async def index(_: AskIndex) -> IndexTold:
        return told

    async with await NatsBus.connect(nats_server.url, name="both") as bus:
        await bus.serve(TELL_VIEW, view)
        await bus.serve(TELL_INDEX, index, "decode-0")
        with pytest.raises(BenchmarkError, match=r"\(1, 2, 3, 4\).*\(1, 2, 3, 5\)"):
            await agreement(bus, ["decode-0"], deadline_s=0.0)
        viewed = viewed.model_copy(update={"digest": 5})
        assert await agreement(bus, ["decode-0"], deadline_s=60.0) == {"decode-0": 3}
        viewed = viewed.model_copy(update={"awaited": True})
        with pytest.raises(BenchmarkError, match="None"):
            await agreement(bus, ["decode-0"], deadline_s=0.0)
