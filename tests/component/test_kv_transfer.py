"""Prefill and decode apart: the answers are generate's, and every transfer ends, with all books balanced."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.bus.errors import RemoteFailure
from common.bus.nats_bus import NatsBus
from common.language.blocks import checksum, layer_part
from common.language.settings import TransferMode
from common.messages.chat import (
    CancelGeneration,
    GenerateTokens,
    KVPart,
    OfferKV,
    Sampling,
    TakeOver,
    TokensGenerated,
    pack_tokens,
)
from common.messages.subjects import CANCEL_GENERATION, GENERATE_TOKENS, MEMBERS, OFFER_KV, TAKE_OVER, TOKENS_GENERATED
from common.messages.tensors import TensorRef
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, Chunk, KVPool, load
from common.tensors.ucx import UcxTensors
from tests.component.chat_support import DECODE, PREFILL
from tests.component.language_support import LanguageStack, gathered, known_prompts, language_stack, shown
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.nats_server import NatsServer
from tests.support.tensor_peer import peers

WAIT_S = 60.0
MODES = tuple(TransferMode)


@pytest.mark.parametrize("mode", MODES)
async def test_answers_go_from_prefill_to_decode_and_are_generates(
    nats_server: NatsServer, language_model: Path, mode: str
) -> None:
    # Nothing is sent ahead of prompts that are computed before it is known what lies there already.
    ahead = [await _answered_apart(nats_server.url, language_model, mode)]
    while mode != "by_request" and not any(ahead) and len(ahead) < 5:
        ahead.append(await _answered_apart(nats_server.url, language_model, mode))
    assert any(ahead) == (mode != "by_request")


async def _answered_apart(url: str, language_model: Path, mode: str) -> bool:
    """Have all prompts answered; whether something was sent ahead."""
    prompts = known_prompts(language_model)
    async with (
        language_stack(url, language_model) as stack,
        language_instance(url, "prefill-0", language_model, PREFILL, chunk_tokens=32, transfer_mode=mode) as prefill,
        language_instance(url, "decode-0", language_model, DECODE) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        answers = await gathered(*(stack.text(prompt) for prompt in prompts))
        for text, expected in zip(answers, prompts.values(), strict=True):
            assert text == shown(expected)
        assert decode.instance.receiving.outcomes == {"taken": len(prompts)}
        assert set(decode.instance.receiving.offers) <= {"taken"}
        # The first token is the whole answer: nothing is handed over.
        prompt, expected = next(iter(prompts.items()))
        assert await stack.text(prompt, 1) == shown(expected[:1])
        await prefill.settled()
        await decode.settled()
        assert decode.instance.receiving.outcomes == {"taken": len(prompts)}
        return bool(decode.instance.receiving.offers)


async def test_drawn_answers_are_the_same_wherever_they_are_computed(
    nats_server: NatsServer, language_model: Path
) -> None:
    drawing = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5}

    async def drawn(stack: LanguageStack) -> list[str]:
        return await gathered(*(stack.text(prompt, seed=7, **drawing) for prompt in known_prompts(language_model)))

    async with language_stack(nats_server.url, language_model) as stack:
        async with language_instance(nats_server.url, "decode-0", language_model):
            await stack.served("decode-0")
            fused = await drawn(stack)
        async with (
            language_instance(nats_server.url, "prefill-0", language_model, PREFILL),
            language_instance(nats_server.url, "decode-1", language_model, DECODE),
        ):
            await stack.served("prefill-0", "decode-1")
            assert await drawn(stack) == fused
    assert len(set(fused)) > 1


@pytest.mark.parametrize("mode", MODES)
async def test_pools_too_small_for_all_and_clients_that_leave(
    nats_server: NatsServer, language_model: Path, mode: str
) -> None:
    small: dict[str, Any] = {"kv_bytes": 24 * BLOCK_BYTES}
    chance = random.Random(8)
    prompts = known_prompts(language_model)
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(
            nats_server.url, "prefill-0", language_model, PREFILL, chunk_tokens=24, transfer_mode=mode, **small
        ) as prefill,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, **small) as decode,
    ):
        await stack.served("prefill-0", "decode-0")

        async def client(prompt: tuple[int, ...], leaves: bool) -> None:
            stream = await stack.stream(prompt)
            text = ""
            left = chance.randrange(4)
            async for chunk in stream:
                text += chunk.choices[0].text
                left -= 1
                if leaves and left < 0:
                    await stream.close()
                    return
            assert text == shown(prompts[prompt])

        await gathered(*(client(chance.choice(list(prompts)), chance.random() < 0.4) for _ in range(40)))
        for watched in (prefill, decode):
            await watched.settled()
            assert watched.books.set_aside_blocks == 0
            assert not watched.model.engine.busy


@dataclass
class PlayedPrefill:
    """Hands sequences over to a real decode instance, as a test wants it, and hears what becomes of them."""

    bus: NatsBus
    tensors: UcxTensors
    pool: KVPool
    table: BlockTable
    heard: asyncio.Queue[TokensGenerated]
    prompt: tuple[int, ...]
    answer: list[int]

    def offer(self, name: str, refs: tuple[TensorRef, ...], value: int | None) -> TakeOver:
        """The sequence with all its blocks."""
        request = GenerateTokens(
            request_id=name,
            epoch=1,
            tokens=pack_tokens((*self.prompt, self.answer[0])),
            generated=1,
            sampling=Sampling(temperature=0.0, seed=0, max_tokens=8),
            gateway="gateway-0",
            decode="decode-0",
            created_at_s=0.0,
        )
        return TakeOver(
            request=request,
            prefill="prefill-0",
            parts=(KVPart(first_token=0, tokens=len(self.prompt), kv=refs, checksum=value),),
            kv_tokens=len(self.prompt),
            block_tokens=BLOCK_TOKENS,
        )

    def ahead(self, name: str, number: int, parts: tuple[KVPart, ...]) -> OfferKV:
        """Some of them before the sequence."""
        return OfferKV(
            request_id=name,
            epoch=1,
            prefill="prefill-0",
            kv_tokens=len(self.prompt),
            block_tokens=BLOCK_TOKENS,
            number=number,
            parts=parts,
        )

    def layer(self, layer: int, first: int, end: int) -> KVPart:
        """One layer of tokens ``first`` to ``end``."""
        part = layer_part(self.pool, self.table, first, end, layer)
        refs = tuple(self.tensors.export(tensor) for tensor in part.kv)
        return KVPart(first_token=first, tokens=end - first, first_layer=layer, kv=refs, checksum=checksum(part.kv))

    async def told(self, name: str, known: int = 1) -> list[int]:
        """The rest of an answer as the gateway hears it, ``known`` tokens of which were known."""
        tokens: list[int] = []
        while True:
            news = await asyncio.wait_for(self.heard.get(), WAIT_S)
            for sequence in news.sequences:
                if sequence.request_id != name:
                    continue
                assert sequence.failure is None
                assert sequence.offset == known + len(tokens)
                tokens += sequence.tokens
                if sequence.finish is not None:
                    return tokens


@contextlib.asynccontextmanager
async def played_prefill(url: str, language_model: Path) -> AsyncIterator[PlayedPrefill]:
    prompt, answer = list(known_prompts(language_model).items())[-1]
    lm = load(language_model, "cpu", torch.float32)
    pool = KVPool(lm.layout, 12)
    # Not neighbours: what travels are several runs.
    table = BlockTable([9, 1, 2, 5, 6, 7])
    lm.forward([Chunk("played", prompt, 0, table)], pool)
    bus = await NatsBus.connect(url, name="played-prefill")
    await bus.prepare(buckets=(MEMBERS,))
    heard: asyncio.Queue[TokensGenerated] = asyncio.Queue(1000)
    await bus.subscribe(TOKENS_GENERATED, heard.put_nowait, "gateway-0")
    try:
        async with await UcxTensors.open(owner="prefill-0") as tensors:
            yield PlayedPrefill(bus, tensors, pool, table, heard, prompt, answer)
    finally:
        await bus.close()


def _exported(played: PlayedPrefill) -> tuple[tuple[TensorRef, ...], int]:
    runs = [played.pool.blocks[9:10], played.pool.blocks[1:3], played.pool.blocks[5:8]]
    return tuple(played.tensors.export(run) for run in runs), checksum(runs)


async def _check(played: PlayedPrefill, decode: Watched, outcome: str, handed: TakeOver) -> None:
    before = decode.instance.receiving.outcomes[outcome]
    await played.bus.request(TAKE_OVER, handed, "decode-0", deadline_s=WAIT_S)
    assert await played.told(handed.request.request_id) == played.answer[1:8]
    assert decode.instance.receiving.outcomes[outcome] == before + 1
    await decode.settled()


async def test_every_transfer_ends_taken_or_recomputed(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        played_prefill(nats_server.url, language_model) as played,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, transfer_s=30.0) as decode,
    ):
        refs, value = _exported(played)
        await _check(played, decode, "taken", played.offer("whole", refs, value))
        refs, value = _exported(played)
        await _check(played, decode, "taken", played.offer("unchecked", refs, None))
        # Into blocks that are no neighbours there either.
        books = decode.books
        others = decode.model.engine.memory.alloc_mem(books.blocks) or []
        decode.model.engine.memory.free_mem(others[::2])
        refs, value = _exported(played)
        handed = played.offer("scattered", refs, value)
        await played.bus.request(TAKE_OVER, handed, "decode-0", deadline_s=WAIT_S)
        assert await played.told("scattered") == played.answer[1:8]
        decode.model.engine.memory.free_mem(others[1::2])
        await decode.settled()
        assert decode.instance.receiving.outcomes == {"taken": 3}

        refs, value = _exported(played)
        await _check(played, decode, "recomputed", played.offer("damaged", refs, value ^ 1))
        refs, value = _exported(played)
        await played.tensors.release(refs[1])
        await _check(played, decode, "recomputed", played.offer("forgotten", refs, value))
        refs, value = _exported(played)
        await _check(played, decode, "recomputed", played.offer("part", refs[:2], value))
        # Nobody sends this; what nobody has thought of must not stay half-way either.
        refs = (*refs, played.tensors.export(played.pool.blocks[:0]))
        with pytest.raises(RemoteFailure, match="IndexError"):
            await played.bus.request(TAKE_OVER, played.offer("odd", refs, value), "decode-0", deadline_s=WAIT_S)
        assert decode.instance.sequences == 0
        await decode.settled()


async def test_what_is_cancelled_on_its_way_is_dropped(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        played_prefill(nats_server.url, language_model) as played,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, kv_bytes=8 * BLOCK_BYTES) as decode,
    ):
        refs, value = _exported(played)
        # No room yet: it waits, and is cancelled meanwhile.
        taken = decode.books.allocate(8) or []
        offering = asyncio.create_task(
            played.bus.request(TAKE_OVER, played.offer("waiting", refs, value), "decode-0", deadline_s=WAIT_S)
        )
        async with asyncio.timeout(WAIT_S):
            while not decode.instance.holds("waiting"):  # noqa: ASYNC110 - another process's would be asked for it
                await asyncio.sleep(0.005)
        await played.bus.publish(CANCEL_GENERATION, CancelGeneration(request_id="waiting", epoch=1), "decode-0")
        await offering
        assert decode.instance.receiving.outcomes == {"dropped": 1}
        decode.books.release(taken)
        await decode.settled()


async def test_without_room_until_the_deadline_it_is_computed_here(
    nats_server: NatsServer, language_model: Path
) -> None:
    async with (
        played_prefill(nats_server.url, language_model) as played,
        language_instance(
            nats_server.url, "decode-0", language_model, kv_bytes=8 * BLOCK_BYTES, transfer_s=0.2
        ) as decode,
    ):
        refs, value = _exported(played)
        taken = decode.books.allocate(8) or []
        await played.bus.request(TAKE_OVER, played.offer("late", refs, value), "decode-0", deadline_s=WAIT_S)
        assert decode.instance.receiving.outcomes == {"recomputed": 1}
        decode.books.release(taken)
        # Whatever comes next wakes the instance.
        short = played.offer("next", (), None).request
        await played.bus.request(GENERATE_TOKENS, short, "decode-0", deadline_s=WAIT_S)
        assert await played.told("late") == played.answer[1:8]
        await decode.settled()


async def test_layers_that_came_ahead_are_gone_on_with(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        played_prefill(nats_server.url, language_model) as played,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, transfer_s=30.0) as decode,
    ):
        whole = len(played.prompt)

        async def offer(number: int, *parts: KVPart) -> None:
            await played.bus.request(OFFER_KV, played.ahead("a", number, parts), "decode-0", deadline_s=WAIT_S)

        await offer(0, played.layer(0, 0, 37))
        await offer(1, played.layer(1, 0, 37), played.layer(0, 37, whole))
        handed = played.offer("a", (), None).model_copy(update={"parts": (played.layer(1, 37, whole),), "offers": 2})
        await _check(played, decode, "taken", handed)
        # A damaged one, one that is not the next, and what is not said to be whole.
        damaged = played.layer(0, 0, whole).model_copy(update={"checksum": 1})
        for number, part in ((0, damaged), (0, played.layer(0, 1, whole)), (3, played.layer(0, 0, whole))):
            with pytest.raises(RemoteFailure):
                await offer(number, part)
        await decode.settled()
        await offer(0, played.layer(0, 0, whole))
        part = played.offer("a", (), None).model_copy(update={"parts": (), "offers": 1})
        handed = part.model_copy(update={"request": part.request.model_copy(update={"epoch": 2})})
        await _check(played, decode, "recomputed", handed)


async def test_what_came_ahead_is_given_up_if_nothing_follows(nats_server: NatsServer, language_model: Path) -> None:
    async with (
        played_prefill(nats_server.url, language_model) as played,
        language_instance(
            nats_server.url, "decode-0", language_model, DECODE, kv_bytes=8 * BLOCK_BYTES, transfer_s=6.0
        ) as decode,
    ):

        async def offer(name: str) -> None:
            message = played.ahead(name, 0, (played.layer(0, 0, 10),))
            await played.bus.request(OFFER_KV, message, "decode-0", deadline_s=WAIT_S)

        await offer("cancelled")
        assert decode.books.held_blocks == 6
        with pytest.raises(RemoteFailure, match="no room"):
            await offer("second")
        await played.bus.publish(CANCEL_GENERATION, CancelGeneration(request_id="cancelled", epoch=1), "decode-0")
        await decode.settled()
        with pytest.raises(RemoteFailure, match="is cancelled"):
            await offer("cancelled")
        await offer("forgotten")
        await decode.settled()


async def test_a_block_is_not_given_out_while_it_may_be_written_to(
    nats_server: NatsServer, language_model: Path
) -> None:
    """Its owner stands still in the midst of a transfer, and its sequence is cancelled meanwhile."""
    async with (
        played_prefill(nats_server.url, language_model) as played,
        peers() as (still,),
        language_instance(
            nats_server.url, "decode-0", language_model, kv_bytes=8 * BLOCK_BYTES, transfer_s=30.0
        ) as decode,
    ):
        clock = asyncio.get_running_loop().time
        ref = await still.export((6, *played.pool.blocks.shape[1:]), "float32")
        still.stop()
        ends_s = clock() + 30.0
        offering = asyncio.create_task(
            played.bus.request(TAKE_OVER, played.offer("stopped", (ref,), None), "decode-0", deadline_s=WAIT_S)
        )
        async with asyncio.timeout(WAIT_S):
            while decode.books.held_blocks != 6:  # noqa: ASYNC110 - the books have no bell
                await asyncio.sleep(0.005)
        written = [block for block in range(8) if decode.books.epoch(block) == 1]
        await played.bus.publish(CANCEL_GENERATION, CancelGeneration(request_id="stopped", epoch=1), "decode-0")
        # Others come and go; they get the two blocks that nobody writes to, for as long as the transfer lasts.
        for number in range(5):
            request = played.offer(f"other {number}", (), None).request.model_copy(
                update={"tokens": pack_tokens(played.prompt[:20]), "generated": 0}
            )
            await played.bus.request(GENERATE_TOKENS, request, "decode-0", deadline_s=WAIT_S)
            assert len(await played.told(f"other {number}", 0)) == 8
            epochs = [decode.books.epoch(block) for block in written]
            assert epochs == [1] * 6 or clock() > ends_s
        still.signal(signal.SIGCONT)
        await offering
        assert decode.instance.receiving.outcomes == {"dropped": 1}
        await decode.settled()
