"""The compiled kernels against their formulas, for any shapes and runs; skipped where there is no compiler."""

import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.causal_lm.native import Kernels, kernels
from common.models.causal_lm.packed import interleave, pack


def _kernels(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    dim=st.sampled_from((8, 20, 64, 80, 128)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_attention_is_the_formula(
    dtype: torch.dtype, kv_heads: int, group: int, dim: int, lengths: list[int], seed: int
) -> None:
    ours = _kernels(dtype)
    noise = torch.Generator().manual_seed(seed)
    chance = random.Random(seed)
    tokens, heads = 2 * len(lengths), kv_heads * group
    # A layer of a pool of three, and queries beside their keys, as models hand them over.
    pool = torch.randn(400, 3, 2, kv_heads, dim, generator=noise).to(dtype)[:, 1]
    query = torch.randn(tokens, heads + kv_heads, dim, generator=noise).to(dtype)[:, :heads]
    rows = chance.sample(range(tokens), len(lengths))
    spans: list[tuple[int, int]] = []
    first_span = [0]
    for number, length in enumerate(lengths):
        cut = chance.randrange(length)
        low = 80 * number
        spans += [(low + cut, low + length), (low, low + cut)] if cut else [(low, low + length)]
        first_span.append(len(spans))
    out = torch.zeros(tokens, heads * dim, dtype=dtype)
    ours.attend(query, pool, torch.tensor(rows), torch.tensor(spans), torch.tensor(first_span), out, dim**-0.5)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        seen = pool[80 * number : 80 * number + length].float()
        keys, values = (seen[:, which].repeat_interleave(group, 1).transpose(0, 1) for which in (0, 1))
        weights = (keys @ query[row].float().unsqueeze(2) * dim**-0.5).softmax(1)
        theirs = (weights * values).sum(1).flatten()
        torch.testing.assert_close(out[row].float(), theirs, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=1e-2)
    others = [row for row in range(tokens) if row not in rows]
    assert not out[others].any()


def test_loading_them_leaves_the_processs_arithmetic_as_it_was() -> None:
    _kernels(torch.float32)
    smallest_normal = torch.tensor([torch.finfo(torch.float32).tiny])
    assert float(smallest_normal / 2) > 0
    assert sys.float_info.min / 2 > 0


def test_types_it_does_not_know_have_none() -> None:
    assert kernels(torch.float16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_norms_rotation_and_storing_are_the_formulas(dtype: torch.dtype, rows: int) -> None:
    ours = _kernels(dtype)
    noise = torch.Generator().manual_seed(rows)
    heads, kv_heads, dim = 6, 2, 24
    tolerance = {"atol": 1e-5 if dtype is torch.float32 else 3e-2, "rtol": 1e-2}
    given = torch.randn(rows, heads + 2 * kv_heads, dim, generator=noise).to(dtype)
    weight = torch.randn(heads + kv_heads, dim, generator=noise)
    flat = given.view(rows, -1)
    own = torch.randn(flat.shape[1], generator=noise)
    normed = torch.nn.functional.rms_norm(flat.float(), own.shape, own, 1e-5)
    torch.testing.assert_close(ours.norm(flat, own, 1e-5).float(), normed, **tolerance)
    angles = torch.randn(rows, dim // 2, generator=noise)
    pool = torch.zeros(2 * rows, 3, 2, kv_heads, dim, dtype=dtype)
    slots = torch.randperm(2 * rows, generator=noise)[:rows]
    for weights in (None, weight):
        prepared = given.clone()
        ours.prepare(prepared, weights, 1e-5, angles.cos(), angles.sin(), slots, pool[:, 1])
        before = given[:, : heads + kv_heads].float()
        if weights is not None:
            before = torch.nn.functional.rms_norm(before, (dim,), eps=1e-5) * weights
        turned = torch.view_as_complex(torch.stack(before.chunk(2, -1), -1)) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        theirs = torch.cat((turned.real, turned.imag), -1)
        torch.testing.assert_close(prepared[:, : heads + kv_heads].float(), theirs, **tolerance)
        assert torch.equal(prepared[:, heads + kv_heads :], given[:, heads + kv_heads :])
        assert torch.equal(pool[slots, 1].flatten(1), prepared[:, heads:].flatten(1))
        assert not pool[:, 0].any() and not pool[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 12, 40, 300])
def test_a_product_over_packed_weights_is_the_product_and_no_row_depends_on_others(
    dtype: torch.dtype, rows: int
) -> None:
    decoder = _kernels(dtype).decoder
    if decoder is None:
        pytest.skip("no AVX-512 for this type")
    noise = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 48, generator=noise).to(dtype)
    # Not a whole number of panels.
    weight, bias = torch.randn(150, 48, generator=noise).to(dtype), torch.randn(150, generator=noise)
    packed = pack(weight, decoder.pair)
    out = decoder.product(x, packed, bias, 150)
    theirs = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(out, theirs, atol=1e-4, rtol=1e-4)
    for row in {0, rows // 2, rows - 1}:
        alone = decoder.product(x[row : row + 1].contiguous(), packed, bias, 150)
        assert torch.equal(out[row], alone[0])


def test_gate_and_up_lie_side_by_side() -> None:
    gate, up = torch.arange(32), torch.arange(100, 132)
    both = interleave(gate, up)
    assert both[:16].tolist() == list(range(16)) and both[16:32].tolist() == list(range(100, 116))
    assert both[32:48].tolist() == list(range(16, 32))
