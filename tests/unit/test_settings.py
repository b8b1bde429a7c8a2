"""What settings say of wrong values."""

import pytest

from common.runtime.settings import SettingsError, load_settings
from services.scheduler.config import SchedulerSettings


def test_a_wrong_value_is_told_once_with_all_that_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_DISPATCH", "foo")
    with pytest.raises(SettingsError) as raised:
        load_settings(SchedulerSettings)
    assert str(raised.value) == (
        "TRIPTYCH_DISPATCH: Input should be 'scheduler' or 'power_of_two', 'least_delay', 'random' or 'imbalance'"
        " (got 'foo')"
    )
