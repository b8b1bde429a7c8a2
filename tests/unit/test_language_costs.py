"""A language model's costs: fitted, written, read by the scheduler."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policies.language.language_costs import ChunkedCost, FitError, LanguageCosts, WrongLanguageCosts
from common.policies.language.prefill_cost import DecodeCost, LinkCost
from common.runtime.process import CannotServe
from compose.errors import OptionError
from compose.local import StackOptions, check_scheduling, variable_values
from compose.profiling.fit import error_of, fit_chunks, fit_link, fit_steps, no_less_than_zero
from compose.profiling.language import costs_table
from compose.profiling.operators import Timed, chunk_works, prompt_works, step_works
from compose.rundir import run_directory
from services.scheduler.choices import choose_rule
from services.scheduler.config import SchedulerSettings

PREFILL = ChunkedCost(256, 0.002, 0.0001, 1e-8, 0.006)
DECODE = DecodeCost(0.004, 0.0002, 1e-6)
LINK = LinkCost(2e9, 0.0, once_s=0.0001)
COSTS = LanguageCosts("triptych-demo-language", 2048, PREFILL, DECODE, LINK, {"prefill": FitError(0.05, 0.2, 15)})


def test_a_prompt_takes_its_chunks_one_after_another() -> None:
    passes = [PREFILL.chunk_s(256, 100), PREFILL.chunk_s(256, 356), PREFILL.chunk_s(88, 612)]
    assert PREFILL.exec_s(700, 100) == pytest.approx(sum(passes))
    assert PREFILL.exec_s(612, 100) == pytest.approx(sum(passes[:2]))
    assert PREFILL.exec_s(612, 611) == PREFILL.floor_s


@given(prompt=st.integers(2, 3000), cached=st.integers(0, 2999))
def test_what_is_cached_is_not_paid_for_again(prompt: int, cached: int) -> None:
    # Without a floor: under it the last chunk is free to be larger, so that the one before can be the cheaper one.
    cost = replace(PREFILL, floor_s=0.0)
    cached %= prompt
    assert cost.exec_s(prompt, cached) <= cost.exec_s(prompt, 0) * (1 + 1e-9)


def test_constants_are_found_again_through_the_noise() -> None:
    noise = np.random.default_rng(1).normal(1.0, 0.02, 1000)
    chunks = [
        Timed(work, PREFILL.chunk_s(work.tokens - work.cached, work.cached) * float(noise[place]))
        for place, work in enumerate(chunk_works(2048, 256))
    ]
    prefill = fit_chunks(chunks, 256)
    assert prefill.token_s == pytest.approx(PREFILL.token_s, rel=0.1)
    assert prefill.floor_s == pytest.approx(PREFILL.floor_s, rel=0.1)
    held = prompt_works(2048)
    error = error_of(
        [prefill.exec_s(work.tokens, work.cached) for work in held],
        [PREFILL.exec_s(work.tokens, work.cached) for work in held],
    )
    assert error.mean < 0.05 and error.points == len(held)
    steps = [
        Timed(work, DECODE.step_s(work.sequences, work.sequences * work.tokens) * float(noise[place]))
        for place, work in enumerate(step_works(2048, 100_000))
    ]
    assert fit_steps(steps).context_token_s == pytest.approx(DECODE.context_token_s, rel=0.1)
    link = fit_link([(size, LINK.send_s(size, 1) * float(noise[size % 999])) for size in (1 << 12, 1 << 16, 1 << 24)])
    assert link.bytes_per_s == pytest.approx(LINK.bytes_per_s, rel=0.1) and link.once_s == pytest.approx(1e-4, rel=0.1)


def test_no_constant_is_below_zero() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert no_less_than_zero(rows, np.array([3.0, 2.0, 1.0])).min() >= 0
    assert fit_link([(1, 2.0), (1000, 1.0)]).bytes_per_s > 0


def test_what_is_measured_fits_the_model_and_its_memory() -> None:
    for longest, chunk in ((64, 16), (64, 100), (2048, 100), (2048, 512)):
        for work in (*chunk_works(longest, chunk), *prompt_works(longest)):
            assert 0 <= work.cached < work.tokens <= longest
        assert max(work.tokens - work.cached for work in chunk_works(longest, chunk)) <= chunk
        for held_out in (False, True):
            works = step_works(longest, 1000, held_out)
            assert all(work.sequences * work.tokens <= 1000 for work in works)
    assert step_works(64, 64)


def test_it_is_written_and_read_and_told() -> None:
    assert LanguageCosts.from_json(json.dumps(COSTS.to_content())) == COSTS
    assert LanguageCosts.from_json("{}") is None
    lines = costs_table(COSTS).splitlines()
    assert lines[1].split()[:6] == ["prefill", "5.0", "%", "20.0", "%", "15"]
    assert lines[-1].startswith("costs of triptych-demo-language")


@pytest.mark.parametrize("change", [{"kv_token_bytes": 0}, {"prefill": {}}, {"link": 5}, {"errors": {"prefill": 1}}])
def test_what_is_no_profile_is_refused(change: dict[str, object]) -> None:
    content = COSTS.to_content()
    content["language_costs"] |= change
    with pytest.raises(WrongLanguageCosts):
        LanguageCosts.from_json(json.dumps(content))
    with pytest.raises(WrongLanguageCosts):
        LanguageCosts.from_json("{")


def test_it_reaches_the_scheduler_of_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIPTYCH_COSTS", raising=False)
    file = tmp_path / "profile.json"
    prefill = {"model": COSTS.model, "tokens_per_s": {"256": 1.0}}
    file.write_text(json.dumps({"prefill": prefill, **COSTS.to_content()}))

    def costs(options: StackOptions) -> str | None:
        check_scheduling(options)
        with run_directory(None) as directory:
            return variable_values(options, directory, 1).get("TRIPTYCH_COSTS")

    assert costs(StackOptions(rib=file)) == str(file)
    assert costs(StackOptions(rib=file, language_model=str(tmp_path))) is None
    by = choose_rule(SchedulerSettings(nats_url="", routing="cost", costs=file))
    assert by.costs.prefill == PREFILL and by.costs.kv_token_bytes == 2048
    guessed = choose_rule(SchedulerSettings(nats_url="", routing="cost", prefill_tokens_s=10.0))
    assert guessed.costs.prefill.exec_s(30, 10) == pytest.approx(2.0)
    file.write_text('{"language_costs": 1}')
    with pytest.raises(OptionError, match="is no profile"):
        check_scheduling(StackOptions(rib=file))
    for text in ("{}", '{"language_costs": 1}'):
        file.write_text(text)
        with pytest.raises(CannotServe, match="TRIPTYCH_COSTS"):
            choose_rule(SchedulerSettings(nats_url="", costs=file))
