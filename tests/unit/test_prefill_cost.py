"""The operator-level cost of a prefill beside what the paper measured (MemServe, figure 14)."""

from statistics import fmean

import pytest

from common.policies.language.prefill_cost import LLAMA2_13B, LLAMA2_13B_LONG, OperatorCost

TOKENS = (64, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4000)
# Milliseconds of one transformer block on one card, by cached share.
MEASURED = {
    0.0: (0.44, 0.47, 0.71, 1.28, 1.88, 2.45, 3.06, 3.64, 4.33, 4.88),
    0.25: (0.49, 0.55, 0.66, 1.18, 1.68, 2.21, 2.80, 3.59, 4.26, 4.96),
    0.5: (0.51, 0.51, 0.60, 0.90, 1.38, 1.77, 2.35, 2.70, 3.38, 3.71),
}


def block_ms(cost: OperatorCost, tokens: int, cached: int) -> float:
    """What the figure shows: one layer, one card."""
    return 1e3 * cost.exec_s(tokens, cached) * cost.parallelism / cost.layers


@pytest.mark.parametrize("share", MEASURED)
def test_it_is_as_near_to_the_measured_times_as_the_papers_own(share: float) -> None:
    errors = [
        abs(block_ms(LLAMA2_13B, tokens, round(tokens * share)) / measured - 1)
        for tokens, measured in zip(TOKENS, MEASURED[share], strict=True)
        if LLAMA2_13B.exec_s(tokens, round(tokens * share)) > LLAMA2_13B.floor_s
    ]
    assert fmean(errors) < 0.07


def test_any_prompt_costs_the_floor_at_least() -> None:
    assert LLAMA2_13B.exec_s(16, 0) == LLAMA2_13B.floor_s
    assert LLAMA2_13B.exec_s(4096, 4095) == LLAMA2_13B.floor_s


def test_long_prompts_follow_the_fit_of_the_brief() -> None:
    for thousands in (4, 12, 60, 126):
        fitted_s = 20e-3 * (0.268 + 0.972 * thousands + 0.046 * thousands**2)
        assert LLAMA2_13B_LONG.exec_s(1000 * thousands, 0) == pytest.approx(fitted_s, rel=0.05)


def test_a_batch_looks_back_at_its_own_prompts_only() -> None:
    one, two = LLAMA2_13B_LONG.exec_s(8192, 0), LLAMA2_13B_LONG.batch_s([(4096, 0), (4096, 0)])
    assert 2 * LLAMA2_13B_LONG.exec_s(4096, 0) > two
    assert two < one


def test_what_is_cached_is_not_computed() -> None:
    costs = [LLAMA2_13B_LONG.exec_s(10_000, cached) for cached in range(0, 10_000, 512)]
    assert costs == sorted(costs, reverse=True)
