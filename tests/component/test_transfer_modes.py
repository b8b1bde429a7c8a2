"""Prefill in one engine, decoding in another, by every transfer mode: tokens and log-probabilities are generate's."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import Engine, Output, Request
from common.language.blocks import Part, blocks_part, checksum, exported, fetch_part, layer_part
from common.language.settings import TransferMode
from common.mempool.address import Address
from common.messages.chat import pack_tokens, tokens_in
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, Chunk, KVPool
from common.tensors.ucx import UcxTensors
from tests.component.test_engine import ANSWER, GREEDY, PROMPTS, check_answer, memory_of, run_engine
from tests.support.causal_lms import FAMILIES, causal_lm

PATIENCE_S = 120.0


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> tuple[str, CausalLM]:
    return request.param, causal_lm(request.param)


class Sending:
    """What of each sequence of an engine has left it, in its mode. A preempted one begins anew."""

    def __init__(self, engine: Engine, mode: TransferMode) -> None:
        self._engine = engine
        self._mode = mode
        self._left: dict[str, list[Part]] = {}
        if mode is TransferMode.BY_LAYER:
            engine.passes.layer_stored = self._layer_stored

    def _layer_stored(self, chunks: list[Chunk], layer: int) -> None:
        for chunk in chunks:
            if not chunk.start and not layer:
                self._left.pop(chunk.sequence, None)
            end = chunk.start + len(chunk.tokens)
            part = layer_part(self._engine.pool, chunk.table, chunk.start, end, layer)
            self._left.setdefault(chunk.sequence, []).append(part)

    def step_done(self) -> None:
        if self._mode is TransferMode.BY_CHUNK:
            for piece in self._engine.computed:
                table = self._engine.table(piece.sequence)
                if not piece.start:
                    self._left.pop(piece.sequence, None)
                if table is not None and not piece.last:
                    self._add_blocks(piece.sequence, table, (piece.start + piece.count) // BLOCK_TOKENS * BLOCK_TOKENS)

    def _add_blocks(self, name: str, table: BlockTable, end: int) -> None:
        parts = self._left.setdefault(name, [])
        first = sum(part.tokens for part in parts)
        if end > first:
            part = blocks_part(self._engine.pool, table, first, end)
            # A copy: what leaves early is not what may be there later.
            parts.append(Part(part.first_token, part.tokens, None, [tensor.clone() for tensor in part.kv]))

    def of(self, name: str, tokens: int) -> list[Part]:
        """All parts of a parked sequence."""
        if self._mode is not TransferMode.BY_LAYER:
            table = self._engine.parked(name)
            assert table is not None
            self._add_blocks(name, table, tokens)
        return self._left[name]


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(TransferMode),
    chosen=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4),
    company=st.lists(st.sampled_from(PROMPTS), max_size=3),
    chunks=st.tuples(st.sampled_from((3, 16, 33, 512)), st.sampled_from((5, 512))),
    blocks=st.tuples(st.integers(16, 30), st.integers(6, 24)),
    scatter=st.integers(0, 99),
)
def test_what_is_handed_over_goes_on_as_generate_would(
    served: tuple[str, CausalLM],
    mode: TransferMode,
    chosen: list[bytes],
    company: list[bytes],
    chunks: tuple[int, int],
    blocks: tuple[int, int],
    scatter: int,
) -> None:
    family, model = served
    memories = [memory_of(model, count, scatter) for count in blocks]
    first, second = (
        Engine(model, pool, None, chunk, 8, memory) for (pool, memory), chunk in zip(memories, chunks, strict=True)
    )
    answers: dict[str, list[Output]] = {}
    for number, prompt in enumerate(company):
        first.add(f"first {number}", Request(prompt, ANSWER, GREEDY), 0.0)
        second.add(f"second {number}", Request(prompt, ANSWER, GREEDY), 0.0)
    asyncio.run(_handed_over(first, second, mode, chosen, answers))
    for engine in (first, second):
        for name, outputs in run_engine(engine).items():
            answers.setdefault(name, []).extend(outputs)
    for number, prompt in enumerate(chosen):
        check_answer(answers[str(number)], family, prompt)
    for number, prompt in enumerate(company):
        check_answer(answers[f"first {number}"], family, prompt)
        check_answer(answers[f"second {number}"], family, prompt)
    for (_, memory), count in zip(memories, blocks, strict=True):
        assert memory.hbm.allocator.free_blocks == count and not memory.hbm.allocator.set_aside_blocks


async def _handed_over(
    first: Engine, second: Engine, mode: TransferMode, chosen: list[bytes], answers: dict[str, list[Output]]
) -> None:
    sending = Sending(first, mode)
    for number, prompt in enumerate(chosen):
        first.add(str(number), Request(prompt, ANSWER, GREEDY, park=True), 0.0)
    waiting = {str(number): prompt for number, prompt in enumerate(chosen)}
    async with await UcxTensors.open("both") as tensors, asyncio.timeout(PATIENCE_S):
        while waiting:
            for output in first.step(0.0):
                answers.setdefault(output.sequence, []).append(output)
            sending.step_done()
            for name in [name for name in waiting if first.parked(name) is not None]:
                prompt = waiting.pop(name)
                answered = pack_tokens((answers[name][0].sampled.token,))
                addresses = _allocated(second, tokens_in(prompt) + 1, answers)
                blocks = [address.block for address in addresses]
                await _moved(tensors, sending.of(name, tokens_in(prompt)), second.pool, blocks)
                second.adopt(name, Request(prompt, ANSWER, GREEDY, answered=answered), addresses, 0.0)
                first.cancel(name, 0.0)


def _allocated(engine: Engine, tokens: int, answers: dict[str, list[Output]]) -> list[Address]:
    """Blocks, as soon as those that are at work there leave enough of them."""
    count = engine.pool.layout.blocks_for(tokens)
    while (blocks := engine.memory.alloc_mem(count)) is None:
        for output in engine.step(0.0):
            answers.setdefault(output.sequence, []).append(output)
    return blocks


async def _moved(tensors: UcxTensors, parts: list[Part], pool: KVPool, blocks: list[int]) -> None:
    async with exported(tensors, parts, PATIENCE_S, check=True) as described:
        for part, sent in zip(described, parts, strict=True):
            came = await fetch_part(tensors, pool, part, BlockTable(blocks), PATIENCE_S, check=True)
            assert came == part.checksum == checksum(sent.kv)
