"""Language models on a GPU: kernels against formulas, answers against transformers', captured steps against others."""

import copy
import random

import pytest
import torch
from torch import Tensor

from common.engine import Engine, Output, Request
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier
from common.messages.chat import pack_tokens
from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, Chunk, KVLayout, KVPool
from common.models.causal_lm.gpu.kernels import GpuKernels, gpu_kernels
from common.models.causal_lm.sampling import SamplingParameters
from tests.support.causal_lms import FAMILIES, VOCABULARY, all_logits, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GREEDY = SamplingParameters(temperature=0, logprobs=0)
ANSWER = 20
# A difference below this in a float32 logit is rounding.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    found = gpu_kernels()
    assert found is not None, "torch on a GPU without Triton"
    return found


def _close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype is torch.float32 else 1e-2
    assert (ours.float() - theirs).norm() <= tolerance * theirs.norm()


# --- kernels -----------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", [48, 3584, 4096])
def test_norms(kernels: GpuKernels, dtype: torch.dtype, size: int) -> None:
    x, weight = torch.randn(5, size, device=DEVICE).to(dtype), torch.rand(size, device=DEVICE)
    _close(kernels.norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x.float(), (size,), weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates(kernels: GpuKernels, dtype: torch.dtype, activation: str) -> None:
    plain = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[activation]
    gate_up = torch.randn(3, 2 * 1500, device=DEVICE).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    _close(kernels.gated(gate_up, activation), plain(gate) * up)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (6, 2, 24), (28, 4, 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_turned_and_stored(
    kernels: GpuKernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, normed: bool
) -> None:
    tokens, rotated = 3, heads + kv_heads
    given = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE).to(dtype)
    weight = torch.rand(rotated, dim, device=DEVICE) + 0.5 if normed else None
    angles = torch.rand(tokens, dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.tensor([40, -1, 7], device=DEVICE)
    pool = KVPool(KVLayout(3, kv_heads, dim, dtype), 3, DEVICE)
    pool.blocks.normal_()
    before, ours = pool.blocks.clone(), given.clone()
    kernels.prepare(ours, weight, 1e-6, cos, sin, slots, pool.layers[1])

    turned = given[:, :rotated].float()
    if weight is not None:
        turned = torch.nn.functional.rms_norm(turned, (dim,), eps=1e-6) * weight
    low, high = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    _close(ours[:, :heads], turned[:, :heads])
    for token, slot in ((0, 40), (2, 7)):
        _close(pool.layers[1][slot, 0], turned[token, heads:])
        assert torch.equal(pool.layers[1][slot, 1], given[token, rotated:])
        pool.layers[1][slot] = before.view(-1, *before.shape[2:])[slot, 1]
    assert torch.equal(pool.blocks, before), "something else was written"


@DTYPES
@pytest.mark.parametrize("sequences", [1, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(4, 2, 8, 0, 0.0), (6, 2, 24, 50, 0.0), (32, 32, 128, 0, 0.0), (28, 4, 128, 50, 0.0), (8, 1, 256, 50, 5.0)],
)
def test_single_tokens_attend_to_their_blocks(
    kernels: GpuKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    sequences: int,
    window: int,
    softcap: float,
) -> None:
    chance = random.Random(sequences)
    blocks = 24
    pool = KVPool(KVLayout(2, kv_heads, dim, dtype), blocks, DEVICE)
    pool.blocks.normal_()
    query = torch.randn(sequences, heads, dim, device=DEVICE).to(dtype)
    tables = [chance.sample(range(blocks), 20) for _ in range(sequences)]
    positions = [chance.choice((0, 15, 16, 63, 64, chance.randrange(320))) for _ in range(sequences)]
    positions[-1] = -1 if sequences > 1 else 319
    ours = kernels.attend(
        query,
        pool.layers[1],
        torch.tensor(positions, device=DEVICE),
        torch.tensor(tables, dtype=torch.int32, device=DEVICE),
        dim**-0.5,
        window,
        softcap,
    ).view(sequences, heads, dim)
    for one, (position, table) in enumerate(zip(positions, tables, strict=True)):
        seen = range(max(0, position + 1 - window) if window else 0, position + 1)
        if not seen:
            assert not ours[one].any()
            continue
        slots = [table[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS for place in seen]
        both = pool.layers[1][slots].float().repeat_interleave(heads // kv_heads, 2)
        scores = torch.einsum("hd,phd->hp", query[one].float(), both[:, 0]) * dim**-0.5
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        _close(ours[one], torch.einsum("hp,phd->hd", scores.softmax(-1), both[:, 1]))


# --- models ------------------------------------------------------------------------------------------------------


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(1, VOCABULARY) for _ in range(length))


def _on_gpu(family: str, dtype: torch.dtype = torch.float32, fuse: bool = True) -> CausalLM:
    return CausalLM(copy.deepcopy(small_model(family)).to(DEVICE, dtype), fuse)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> tuple[str, CausalLM]:
    return request.param, _on_gpu(request.param)


PROMPTS = [_prompt(number, length) for number, length in enumerate((1, 15, 16, 30, 47))]


def _answers(model: CausalLM, chunk: int, blocks: int, scatter: bool = False) -> dict[str, list[Output]]:
    pool = KVPool(model.layout, 2 * blocks if scatter else blocks, DEVICE)
    memory = MemPool("own", Tier.over(pool.blocks))
    if scatter:
        taken = memory.alloc_mem(2 * blocks) or []
        memory.free_mem(random.Random(blocks).sample(taken, blocks))
    engine = Engine(model, pool, None, chunk, 256, memory)
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), Request(pack_tokens(prompt), ANSWER, GREEDY), 0.0)
    answers: dict[str, list[Output]] = {}
    for _ in range(1000):
        if not engine.busy:
            return answers
        for output in engine.step(0.0):
            answers.setdefault(output.sequence, []).append(output)
    raise AssertionError("the engine does not come to an end")


def _generated(family: str, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """What transformers' generate answers on the GPU, and by how much each token was likelier than the next best."""
    model = copy.deepcopy(small_model(family)).to(DEVICE)
    ids = torch.tensor([prompt], device=DEVICE)
    with torch.inference_mode():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.cat(whole.logits).topk(2).values
    return whole.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


@pytest.mark.parametrize(
    ("chunk", "blocks", "scatter"),
    [(512, 40, False), (7, 24, True), (33, 7, False)],
    ids=["whole", "odd", "preempting"],
)
def test_greedy_answers_are_those_of_generate(
    served: tuple[str, CausalLM], chunk: int, blocks: int, scatter: bool
) -> None:
    family, model = served
    answers = _answers(model, chunk, blocks, scatter)
    for number, prompt in enumerate(PROMPTS):
        tokens, margins = _generated(family, prompt)
        ours = [output.sampled.token for output in answers[str(number)]]
        assert len(ours) == ANSWER
        for place, (one, other) in enumerate(zip(ours, tokens, strict=True)):
            if one != other:
                assert margins[place] < ROUNDING, f"prompt {number}, token {place}"
                break


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_captured_steps_are_those_that_are_not(family: str) -> None:
    model = _on_gpu(family)
    captured = _answers(model, 16, 24)
    model.capture = False
    assert _answers(model, 16, 24) == captured


@pytest.mark.parametrize("fuse", [True, False], ids=["ours", "transformers'"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_near(family: str, fuse: bool) -> None:
    model = _on_gpu(family, torch.bfloat16, fuse)
    prompts = _prompt(5, 60), _prompt(6, 9), _prompt(7, 1)
    pool = KVPool(model.layout, 8, DEVICE)
    tables = [BlockTable([2, 0, 1, 7]), BlockTable([3]), BlockTable([5])]
    model.forward([Chunk("a", prompts[0][:33], 0, tables[0], False)], pool)
    model.forward([Chunk("a", prompts[0][33:59], 33, tables[0], False)], pool)
    first = prompts[0][59:], *prompts[1:]
    chunks = [Chunk(str(row), tokens, 59 * (row == 0), tables[row]) for row, tokens in enumerate(first)]
    for logits, prompt in zip(model.forward(chunks, pool).cpu(), prompts, strict=True):
        assert torch.nn.functional.cosine_similarity(logits, all_logits(family, prompt)[-1], dim=0) > 0.99
