"""Sampling against transformers' logits processors and against plain formulas, rows mixed in one batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.models.causal_lm import WrongSamplingError
from common.models.causal_lm.filters import keep_top
from common.models.causal_lm.sampling import History, SamplingParameters, sample

VOCABULARY = 400
PARAMETERS = st.builds(
    SamplingParameters,
    temperature=st.sampled_from((0.0, 0.3, 1.0, 1.7)),
    top_p=st.sampled_from((0.05, 0.5, 0.9, 0.999, 1.0)),
    top_k=st.sampled_from((0, 1, 7, 300, 1000)),
    min_p=st.sampled_from((0.0, 0.02, 0.3)),
    repetition_penalty=st.sampled_from((1.0, 1.3, 0.8)),
    seed=st.integers(0, 2**63),
    logprobs=st.sampled_from((None, 0, 3)),
)


def _logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _theirs(logits: torch.Tensor, one: SamplingParameters, seen: list[int]) -> torch.Tensor:
    """[vocabulary] logits as transformers shapes them."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(one.repetition_penalty)])
    if one.temperature:
        steps.append(TemperatureLogitsWarper(one.temperature))
    if one.top_k:
        steps.append(TopKLogitsWarper(one.top_k))
    if one.top_p < 1:
        steps.append(TopPLogitsWarper(one.top_p))
    if one.min_p:
        steps.append(MinPLogitsWarper(one.min_p))
    return steps(torch.tensor([seen]), logits.unsqueeze(0).clone())[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(PARAMETERS, st.integers(0, 40)), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_what_may_be_drawn_is_what_transformers_leaves(rows: list[tuple[SamplingParameters, int]], seed: int) -> None:
    logits = _logits(len(rows), seed)
    histories = [History(frozenset({3, 5}), Counter({7: 2, 9: 1}), drawn) for _, drawn in rows]
    sampled = sample(logits, [one for one, _ in rows], histories)
    alone = [sample(logits[row : row + 1], [one], [histories[row]])[0].token for row, (one, _) in enumerate(rows)]
    assert [one.token for one in sampled] == alone
    for row, (one, _) in enumerate(rows):
        theirs = _theirs(logits[row], one, [3, 5, 7, 9])
        if one.temperature == 0:
            assert sampled[row].token == _penalized_best(logits[row], one)
        else:
            assert torch.isfinite(theirs[sampled[row].token])
        known = logits[row].log_softmax(-1)
        if one.logprobs is None:
            assert sampled[row].logprob is None
        else:
            assert sampled[row].logprob == pytest.approx(float(known[sampled[row].token]), abs=1e-5)
            assert [token for token, _ in sampled[row].top] == known.topk(one.logprobs).indices.tolist()


def _penalized_best(logits: torch.Tensor, one: SamplingParameters) -> int:
    steps = RepetitionPenaltyLogitsProcessor(one.repetition_penalty)
    return int(steps(torch.tensor([[3, 5, 7, 9]]), logits.unsqueeze(0).clone())[0].argmax())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    top_k=st.lists(st.sampled_from((0, 1, 20, 399, 400, 999)), min_size=3, max_size=3),
    top_p=st.lists(st.sampled_from((0.01, 0.5, 0.9, 0.99, 1.0)), min_size=3, max_size=3),
    min_p=st.lists(st.sampled_from((0.0, 0.1)), min_size=3, max_size=3),
    width=st.sampled_from((0.01, 3.0)),
    seed=st.integers(0, 10**6),
)
def test_the_filters_keep_the_same_tokens(
    top_k: list[int], top_p: list[float], min_p: list[float], width: float, seed: int
) -> None:
    logits = width * _logits(3, seed)
    kept: dict[int, set[int]] = {}
    for some in keep_top(logits, top_k, top_p, min_p):
        for place, row in enumerate(some.rows.tolist()):
            places = torch.isfinite(some.scores[place]).nonzero().flatten()
            assert row not in kept
            kept[row] = set((places if some.tokens is None else some.tokens[place, places]).tolist())
    for row in range(3):
        parameters = SamplingParameters(top_k=top_k[row], top_p=top_p[row], min_p=min_p[row])
        theirs = set(torch.isfinite(_theirs(logits[row], parameters, [])).nonzero().flatten().tolist())
        # Sums of probabilities are rounded: one token at the very limit may fall on either side.
        assert len(kept[row] ^ theirs) <= 1


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    parameters = [SamplingParameters(seed=seed // 40) for seed in range(4000)]
    sampled = sample(logits, parameters, [History(drawn=row % 40) for row in range(4000)])
    shares = np.bincount([one.token for one in sampled], minlength=4) / 4000
    assert np.abs(shares - logits[0].softmax(-1).numpy()).max() < 0.03


def test_presence_and_frequency_are_taken_from_the_answers_tokens() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.2, 0.1]])
    history = History(frozenset({1}), Counter({0: 3}), 3)

    def best(**penalties: float) -> int:
        return sample(logits, [SamplingParameters(temperature=0, **penalties)], [history])[0].token

    assert best() == 0
    assert best(presence_penalty=0.2) == 1
    assert best(frequency_penalty=0.02) == 0
    assert best(frequency_penalty=0.04) == 1
    assert best(presence_penalty=-2, repetition_penalty=1.9) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"logprobs": -1}],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(WrongSamplingError, match=next(iter(wrong))):
        SamplingParameters(**wrong)  # type: ignore[arg-type]
