"""Paged forward passes against transformers' own, whatever the chunks, the blocks and the company."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.causal_lm import (
    BlockTable,
    CausalLM,
    Chunk,
    KVLayout,
    KVPool,
    ModelLoadError,
    UnsupportedModelError,
    WrongChunkError,
    load,
)
from tests.support.causal_lms import CONTEXT, FAMILIES, VOCABULARY, all_logits, causal_lm, small_model

BLOCKS = 24
TOLERANCE = 1e-4


# Each family in its fastest way and in the plainest.
@pytest.fixture(scope="module", params=[(family, fast) for family in FAMILIES for fast in (True, False)], ids=str)
def served(request: pytest.FixtureRequest) -> tuple[str, CausalLM]:
    family, fast = request.param
    return family, causal_lm(family, fuse=fast, native=fast)


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(1, VOCABULARY) for _ in range(length))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), scatter=st.booleans())
def test_logits_are_transformers_for_any_chunks_blocks_and_company(
    served: tuple[str, CausalLM], seed: int, scatter: bool
) -> None:
    family, model = served
    chance = random.Random(seed)
    prompts = [_prompt(number, length) for number, length in enumerate((61, 18, 1))]
    blocks = chance.sample(range(BLOCKS), BLOCKS) if scatter else list(range(BLOCKS))
    tables = [BlockTable(blocks[4 * number : 4 * number + 4]) for number in range(len(prompts))]
    pool = KVPool(model.layout, BLOCKS)
    done = [0] * len(prompts)
    while any(place < len(prompt) for place, prompt in zip(done, prompts, strict=True)):
        chunks, after = [], []
        for number, prompt in enumerate(prompts):
            piece = prompt[done[number] : done[number] + chance.choice((0, 1, 7, 16, 40))]
            if piece:
                chunks.append(Chunk(str(number), piece, done[number], tables[number], chance.random() < 0.7))
                done[number] += len(piece)
                if chunks[-1].logits:
                    after.append(all_logits(family, prompt)[done[number] - 1])
        if chunks:
            logits = model.forward(chunks, pool)
            assert logits.shape == (len(after), VOCABULARY)
            for ours, theirs in zip(logits, after, strict=True):
                torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=TOLERANCE, rtol=0)


def test_blocks_moved_to_another_pool_go_on_there(served: tuple[str, CausalLM]) -> None:
    family, model = served
    prompt = _prompt(3, 45)
    here, there = KVPool(model.layout, 3), KVPool(model.layout, 9)
    model.forward([Chunk("a", prompt[:40], 0, BlockTable([0, 1, 2]), False)], here)
    there.blocks[[7, 2, 3]] = here.blocks[[0, 1, 2]]
    logits = model.forward([Chunk("a", prompt[40:], 40, BlockTable([7, 2, 3]))], there)
    theirs = all_logits(family, prompt)[-1]
    torch.testing.assert_close(logits[0].log_softmax(-1), theirs.log_softmax(-1), atol=TOLERANCE, rtol=0)


def test_half_precision_stays_near() -> None:
    model = CausalLM(small_copy("llama").to(torch.bfloat16))
    assert model.layout.dtype is torch.bfloat16
    prompt = _prompt(5, 40)
    pool, table = KVPool(model.layout, 3), BlockTable([2, 0, 1])
    model.forward([Chunk("a", prompt[:39], 0, table, False)], pool)
    ours = model.forward([Chunk("a", prompt[39:], 39, table)], pool)[0]
    assert torch.nn.functional.cosine_similarity(ours, all_logits("llama", prompt)[-1], dim=0) > 0.995


def small_copy(family: str) -> transformers.PreTrainedModel:
    return type(small_model(family)).from_pretrained(
        None, config=small_model(family).config, state_dict=small_model(family).state_dict()
    )


def test_a_block_is_one_piece_of_memory_and_sized_in_bytes() -> None:
    layout = KVLayout(layers=3, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    assert layout.block_bytes == 16 * 3 * 2 * 2 * 8 * 2
    pool = KVPool.of_bytes(layout, 5 * layout.block_bytes + 1)
    assert pool.blocks.shape == (5, 16, 3, 2, 2, 8)
    assert pool.blocks[3].is_contiguous() and pool.blocks[3].nbytes == layout.block_bytes
    with pytest.raises(ValueError, match="holds no block"):
        KVPool.of_bytes(layout, layout.block_bytes - 1)


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (Chunk("a", (), 0, BlockTable([0])), "no chunk"),
        (Chunk("a", (1,) * 17, 0, BlockTable([0])), "do not fit"),
        (Chunk("a", (1, 2), CONTEXT - 1, BlockTable(range(20))), "shorten the prompt"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(chunk: Chunk, said: str) -> None:
    model = causal_lm("llama")
    with pytest.raises(WrongChunkError, match=said):
        model.forward([chunk], KVPool(model.layout, 20))


def _mamba() -> transformers.PreTrainedModel:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, num_hidden_layers=2, hidden_size=32))


def _with_sinks() -> transformers.PreTrainedModel:
    size = {"vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**size, **heads))


@pytest.mark.parametrize(("made", "said"), [(_mamba, "Mamba"), (_with_sinks, "attends with s_aux")])
def test_other_architectures_are_refused_with_a_remedy(
    made: Callable[[], transformers.PreTrainedModel], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{said}.*such as Llama"):
        CausalLM(made())


def test_a_published_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    small_model("qwen3").save_pretrained(tmp_path)
    model = load(tmp_path)
    prompt = _prompt(9, 20)
    logits = model.forward([Chunk("a", prompt, 0, BlockTable([0, 1]))], KVPool(model.layout, 2))
    torch.testing.assert_close(logits[0], all_logits("qwen3", prompt)[-1], atol=TOLERANCE, rtol=0)


def test_what_is_not_there_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(tmp_path)
    small_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(tmp_path)
