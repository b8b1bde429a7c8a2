"""MemServe's designs on live instances: what each computes and sends in a conversation, to the token and the byte."""

import asyncio
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from common.bus.errors import RemoteFailure
from common.bus.nats_bus import NatsBus
from common.mempool.address import BLOCK_TOKENS, KEY_BYTES, Medium
from common.mempool.caching import Caching
from common.mempool.transfer import TransferFlags
from common.messages.chat import ChatRoute, RouteChat, pack_tokens
from common.messages.mempool import MatchPrefix, SendPrefix
from common.messages.subjects import MATCH_PREFIX, ROUTE_CHAT, SEND_PREFIX
from tests.component.chat_support import DECODE, PREFILL
from tests.component.gateway_support import until
from tests.component.language_support import LanguageStack, gathered, known_prompts, language_stack, shown
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES, greedy
from tests.support.nats_server import NatsServer

TURNS = 4
USER = 21
ANSWER = 20
PATIENCE_S = 60.0
# What is counted is counted of transfers that come, however slow the machine.
PATIENT = {"transfer_s": 60.0}


@dataclass(frozen=True)
class Turn:
    """What the model is given, and what it answers."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@cache
def conversation(folder: Path, seed: int = 0) -> list[Turn]:
    """Every turn goes on from the answer before. No answer is near a tie, none ends early."""
    chance = random.Random(seed)
    turns: list[Turn] = []
    while len(turns) < TURNS:
        before = turns[-1].whole if turns else ()
        prompt = before + tuple(chance.randrange(0, 256) for _ in range(USER))
        answer = greedy(folder, prompt, ANSWER)
        if answer.margin >= 1e-4 and len(answer.tokens) == ANSWER:
            turns.append(Turn(prompt, tuple(answer.tokens)))
    return turns


def blocks_in(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def whole_blocks(tokens: int) -> int:
    """Tokens, in whole blocks."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


async def _said(stack: LanguageStack, turn: Turn) -> int:
    """Have it answered; of how many of its tokens keys and values were there, as the client is told."""
    told = await stack.client.completions.create(
        model=stack.model, prompt=list(turn.prompt), max_tokens=ANSWER, temperature=0
    )
    assert told.choices[0].text == shown(list(turn.answer))
    assert told.usage is not None and told.usage.prompt_tokens_details is not None
    return told.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.parametrize("caching", list(Caching))
async def test_what_a_turn_costs(nats_server: NatsServer, language_model: Path, caching: Caching) -> None:
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "prefill-0", language_model, PREFILL, caching=caching, **PATIENT) as prefill,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, caching=caching, **PATIENT) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        counts, hand_over = prefill.model.engine.counts, prefill.instance.hand_over
        before: Turn | None = None
        for number, turn in enumerate(conversation(language_model)):
            prefilled, sent = counts.prefilled, hand_over.sent_bytes + hand_over.ahead.sent_bytes
            cached = await _said(stack, turn)
            # What was sent is counted once it was taken, which the client does not wait for.
            await prefill.settled()
            # What can be known of the turn before: of the prompt all, of the answer all but the last token.
            prompt, whole = (len(before.prompt), len(before.whole) - 1) if before else (0, 0)
            at_prefill = {Caching.PD_BASIC: 0, Caching.PD_CACHING_3: whole_blocks(whole)}.get(
                caching, whole_blocks(prompt)
            )
            at_decode = whole_blocks(whole) if caching.keeps_received else 0
            assert cached == at_prefill
            assert counts.prefilled - prefilled == len(turn.prompt) - at_prefill
            assert (
                hand_over.sent_bytes - sent == (blocks_in(len(turn.prompt)) - at_decode // BLOCK_TOKENS) * BLOCK_BYTES
            )
            if caching.sends_back:
                await _sent_back(decode, number + 1)
            before = turn
        assert decode.instance.receiving.outcomes == {"taken": TURNS}
        await prefill.settled()
        await decode.settled()
        if caching is Caching.PD_BASIC:
            assert not prefill.books.idle_blocks and not decode.books.idle_blocks


async def _sent_back(decode: Watched, count: int) -> None:
    outcomes = decode.instance.sending_back.outcomes

    async def done() -> bool:
        return outcomes["sent"] == count

    await until(done, deadline_s=PATIENCE_S)


@pytest.mark.parametrize("colder", [{}, {"kv_dram_bytes": 8 * BLOCK_BYTES}, {"kv_disk_bytes": 40 * BLOCK_BYTES}])
async def test_conversations_through_memory_too_small_for_them(
    nats_server: NatsServer, language_model: Path, colder: dict[str, int]
) -> None:
    """Evicted, swapped, sent, sent back: the answers are the same."""
    chats = [conversation(language_model, seed) for seed in range(4)]
    small = {"kv_bytes": 14 * BLOCK_BYTES, "chunk_tokens": 32} | colder
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "prefill-0", language_model, PREFILL, **small) as prefill,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, **small) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        for place in range(TURNS):
            await gathered(*(_said(stack, turns[place]) for turns in chats))
        for watched in (prefill, decode):
            await watched.settled()
            for tier in watched.model.engine.memory.tiers.values():
                assert tier.allocator.free_blocks + tier.allocator.idle_blocks == tier.allocator.blocks
        assert prefill.model.engine.counts.found


async def test_several_answers_to_one_prompt(nats_server: NatsServer, language_model: Path) -> None:
    prompt, expected = list(known_prompts(language_model).items())[-1]
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model) as served,
    ):
        await stack.served("decode-0")
        told = await stack.client.completions.create(
            model=stack.model, prompt=list(prompt), max_tokens=8, temperature=0, n=4
        )
        assert {choice.text for choice in told.choices} == {shown(expected[:8])}
        once = whole_blocks(len(prompt) - 1)
        assert served.model.engine.counts.prefilled == len(prompt) + 3 * (len(prompt) - once)
        await served.settled()


async def test_blocks_are_moved_and_found_and_nothing_else_is(nats_server: NatsServer, language_model: Path) -> None:
    turn = conversation(language_model)[-1]
    tokens = pack_tokens(turn.prompt)
    tokens = tokens[: len(tokens) // KEY_BYTES * KEY_BYTES]
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, **PATIENT) as first,
    ):
        await stack.served("decode-0")
        await _said(stack, turn)
        async with language_instance(
            nats_server.url,
            "decode-1",
            language_model,
            kv_bytes=20 * BLOCK_BYTES,
            kv_dram_bytes=20 * BLOCK_BYTES,
            **PATIENT,
        ) as second:
            await stack.served("decode-1")
            memory, transfers = first.model.engine.memory, first.instance.transfers
            other = second.model.engine.memory
            held = memory.match(tokens, hold=True)
            # Without its beginning it is of no use there.
            with pytest.raises(RemoteFailure, match="0 of 2 blocks are here"):
                await transfers.transfer_with_insert("decode-1", tokens, held[2:])
            far, near = TransferFlags.DRAM, TransferFlags.CHECK
            # What is to follow in HBM brings there what comes before it.
            for flags, then, medium in ((near, near, Medium.HBM), (far, far, Medium.DRAM), (far, near, Medium.HBM)):
                await transfers.transfer_with_insert("decode-1", tokens[: 2 * KEY_BYTES], held[:2], flags=flags)
                moved = await transfers.transfer_with_insert("decode-1", tokens, held[2:], flags=then)
                there = other.match(tokens)
                assert there[2:] == moved and {address.medium for address in there} == {medium}
                for one, own in zip(there, held, strict=True):
                    assert other.tiers[one.medium].memory[one.block].equal(memory.hbm.memory[own.block])
                # Once more it is known, and nothing is sent.
                sent = transfers.sent_bytes
                assert await transfers.transfer_with_insert("decode-1", tokens, held) == []
                assert transfers.sent_bytes == sent == len(held) * BLOCK_BYTES
                transfers.sent_bytes = 0
                assert other.delete(tokens) + other.delete(tokens[: 2 * KEY_BYTES]) == len(held)
                assert other.match(tokens) == []
            with pytest.raises(RemoteFailure, match="for nobody here"):
                await transfers.transfer("decode-1", held)
            # No room: somebody holds all of it.
            taken = other.alloc_mem(20) or []
            with pytest.raises(RemoteFailure, match="not to be had"):
                await transfers.transfer_with_insert("decode-1", tokens, held)
            other.free_mem(taken)
            await transfers.transfer_with_insert("decode-1", tokens, held)
            memory.free_mem(held)
            await first.settled()
            await second.settled()
            # Whoever goes on from there finds it.
            first.stop.set()
            await stack.lost("decode-0")
            assert await _said(stack, turn) == whole_blocks(len(turn.prompt) - 1)


async def test_what_one_has_another_can_pull(nats_server: NatsServer, language_model: Path) -> None:
    first_turn, turn = conversation(language_model)[:2]
    tokens = pack_tokens(turn.prompt)
    async with (
        await NatsBus.connect(nats_server.url, name="asking") as bus,
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, **PATIENT) as first,
    ):
        await stack.served("decode-0")
        await _said(stack, first_turn)
        known = whole_blocks(len(first_turn.whole) - 1)
        async with language_instance(nats_server.url, "decode-1", language_model, **PATIENT) as second:
            await stack.served("decode-1")
            for sent in (known, 0):
                ask = SendPrefix(tokens=tokens, to="decode-1")
                assert (await bus.request(SEND_PREFIX, ask, "decode-0", deadline_s=PATIENCE_S)).tokens == sent
            with pytest.raises(RemoteFailure):
                await bus.request(
                    SEND_PREFIX, SendPrefix(tokens=tokens, to="nobody"), "decode-0", deadline_s=PATIENCE_S
                )
            first.stop.set()
            await stack.lost("decode-0")
            assert await _said(stack, turn) == known
            await second.settled()


async def test_what_a_route_pulls_is_there_when_the_gateway_hears_of_it(
    nats_server: NatsServer, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever can be sent is sent sooner than computed.
    monkeypatch.setenv("TRIPTYCH_ROUTING", "cost")
    monkeypatch.setenv("TRIPTYCH_PREFILL_TOKENS_S", "1")
    monkeypatch.setenv("TRIPTYCH_TRANSFER_TOKENS_S", "1000000")
    first_turn, turn = conversation(language_model)[:2]
    known = whole_blocks(len(first_turn.whole) - 1)
    async with (
        await NatsBus.connect(nats_server.url, name="asking") as bus,
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model, **PATIENT),
    ):
        await stack.served("decode-0")
        await _said(stack, first_turn)
        async with language_instance(nats_server.url, "decode-1", language_model, **PATIENT):
            await stack.served("decode-1")

            async def route(name: str, tokens: tuple[int, ...]) -> ChatRoute:
                asked = RouteChat(
                    request_id=name,
                    gateway="nobody",
                    tokens=pack_tokens(tokens),
                    prompt_tokens=len(tokens),
                    max_tokens=1,
                    wait_s=PATIENCE_S,
                    created_at_s=0.0,
                )
                return await bus.request(ROUTE_CHAT, asked, deadline_s=PATIENCE_S)

            async def told() -> bool:
                return (await route("probe", turn.prompt)).best_cached_tokens == known

            await until(told, deadline_s=PATIENCE_S)
            # Never computed, so that the next one does not wait for it.
            assert (await route("long", (7,) * 1000)).prefill == "decode-1"
            assert (await route("longer", (8,) * 5000)).prefill == "decode-0"
            found = await route("turn", turn.prompt)
            assert (found.prefill, found.best_cached_tokens) == ("decode-1", known)
            asked = MatchPrefix(tokens=pack_tokens(turn.prompt))
            assert (await bus.request(MATCH_PREFIX, asked, "decode-1", deadline_s=PATIENCE_S)).tokens == known


async def test_turns_at_once_are_sent_back_in_the_background(nats_server: NatsServer, language_model: Path) -> None:
    chats = [conversation(language_model, seed) for seed in range(3)]
    async with (
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "prefill-0", language_model, PREFILL, **PATIENT) as prefill,
        language_instance(nats_server.url, "decode-0", language_model, DECODE, **PATIENT) as decode,
    ):
        await stack.served("prefill-0", "decode-0")
        await gathered(*(_said(stack, turns[0]) for turns in chats))
        await _sent_back(decode, len(chats))
        assert (
            decode.instance.transfers.sent_bytes
            == sum((len(turns[0].whole) - 1) // BLOCK_TOKENS - len(turns[0].prompt) // BLOCK_TOKENS for turns in chats)
            * BLOCK_BYTES
        )
        cached = await asyncio.gather(*(_said(stack, turns[1]) for turns in chats))
        assert cached == [whole_blocks(len(turns[0].whole) - 1) for turns in chats]
        await prefill.settled()
        await decode.settled()
