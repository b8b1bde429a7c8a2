"""How often a latent is copied: as seldom as keeps the copies under a hundredth of the steps' time, no seldomer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.runtime.settings import SettingsError, load_settings
from services.dit.config import DitSettings
from services.dit.interval import COST_SHARE, CheckpointInterval


@pytest.mark.parametrize(
    ("copy_s", "step_s", "every"),
    [(0.0, 0.1, 1), (0.001, 0.1, 1), (0.0011, 0.1, 2), (0.05, 0.1, 50), (0.0002, 0.1, 1), (0.003, 0.05, 6)],
)
def test_a_copy_costs_at_most_a_hundredth_of_the_steps_it_saves(copy_s: float, step_s: float, every: int) -> None:
    interval = CheckpointInterval(copy_s)
    interval.step_took(step_s)
    assert interval.every == every


@given(st.floats(1e-7, 1.0), st.floats(1e-4, 10.0))
def test_no_smaller_interval_would_do(copy_s: float, step_s: float) -> None:
    interval = CheckpointInterval(copy_s)
    interval.step_took(step_s)
    assert copy_s <= COST_SHARE * interval.every * step_s * (1 + 1e-8)
    assert interval.every == 1 or copy_s > COST_SHARE * (interval.every - 1) * step_s * (1 - 1e-8)


@pytest.mark.parametrize(("store_cost_s", "step_s", "every"), [(0.0, 0.02, 1), (0.01, 0.02, 10), (0.01, 0.5, 1)])
def test_what_a_store_takes_from_the_steps_is_at_most_a_twentieth(
    store_cost_s: float, step_s: float, every: int
) -> None:
    interval = CheckpointInterval(0.0, store_s=0.01, store_cost_s=store_cost_s)
    interval.step_took(step_s)
    assert interval.every == every


def test_every_so_many_steps_one_is_due() -> None:
    interval = CheckpointInterval(copy_s=0.003)
    due = [step for step in range(1, 13) if interval.step_took(0.1)]
    assert due == [3, 6, 9, 12]


def test_a_set_interval_is_kept_to_whatever_it_costs() -> None:
    interval = CheckpointInterval(copy_s=10.0, fixed=2)
    assert [step for step in range(1, 8) if interval.step_took(0.001)] == [2, 4, 6]


def test_steps_that_become_shorter_are_followed() -> None:
    interval = CheckpointInterval(copy_s=0.001)
    assert interval.step_took(0.1)
    for _ in range(9):
        interval.step_took(0.01)
    assert interval.every == 6


def test_the_interval_is_found_or_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(DitSettings).checkpoint_steps == "auto"
    monkeypatch.setenv("TRIPTYCH_CHECKPOINT_STEPS", "3")
    assert load_settings(DitSettings).checkpoint_steps == 3
    for wrong in ("0", "often"):
        monkeypatch.setenv("TRIPTYCH_CHECKPOINT_STEPS", wrong)
        with pytest.raises(SettingsError, match="TRIPTYCH_CHECKPOINT_STEPS"):
            load_settings(DitSettings)


def test_a_slow_store_comes_to_its_end_between_two_checkpoints() -> None:
    interval = CheckpointInterval(copy_s=0.0, store_s=0.025)
    assert [interval.step_took(0.01) for _ in range(6)] == [False, False, True, False, False, True]
    assert interval.every == 3
