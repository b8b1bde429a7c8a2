"""The compiled decode kernel against the formula, for any shape and runs; skipped where there is no compiler."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.causal_lm.native import DecodeKernel, decode_kernel


def _kernel(dtype: torch.dtype) -> DecodeKernel:
    kernel = decode_kernel(dtype)
    if kernel is None:
        pytest.skip("no C++ compiler")
    return kernel


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    dim=st.sampled_from((8, 20, 64, 80, 128)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_it_computes_the_formula(
    dtype: torch.dtype, kv_heads: int, group: int, dim: int, lengths: list[int], seed: int
) -> None:
    kernel = _kernel(dtype)
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
    kernel(query, pool, torch.tensor(rows), torch.tensor(spans), torch.tensor(first_span), out, dim**-0.5)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        seen = pool[80 * number : 80 * number + length].float()
        keys, values = (seen[:, which].repeat_interleave(group, 1).transpose(0, 1) for which in (0, 1))
        weights = (keys @ query[row].float().unsqueeze(2) * dim**-0.5).softmax(1)
        theirs = (weights * values).sum(1).flatten()
        torch.testing.assert_close(out[row].float(), theirs, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=1e-2)
    others = [row for row in range(tokens) if row not in rows]
    assert not out[others].any()


def test_types_it_does_not_know_have_none() -> None:
    assert decode_kernel(torch.float16) is None
