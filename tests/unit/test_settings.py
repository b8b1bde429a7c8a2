"""What is said of settings' wrong values, and of variables that are no settings."""

import asyncio
from pathlib import Path

import pytest
import structlog

from common.runtime.process import run_service
from common.runtime.settings import SettingsError, load_settings
from common.runtime.variables import settings_variables, stack_variables, unknown_variables
from compose.environment import overruled, set_aside, unknown
from compose.local import StackOptions
from compose.spec import read_stack
from services.scheduler.config import SchedulerSettings


def test_a_wrong_value_is_told_once_with_all_that_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_DISPATCH", "foo")
    with pytest.raises(SettingsError) as raised:
        load_settings(SchedulerSettings)
    assert str(raised.value) == (
        "TRIPTYCH_DISPATCH: Input should be 'scheduler' or 'power_of_two', 'least_delay', 'random' or 'imbalance'"
        " (got 'foo')"
    )


def test_a_misspelt_variable_is_told_with_the_one_that_was_meant() -> None:
    environment = ["TRIPTYCH_FLIPP", "TRIPTYCH_KVBYTES", "TRIPTYCH_ZZZ", "TRIPTYCH_FLIP", "TRIPTYCH_TEST_KILLS", "PATH"]
    assert unknown_variables(environment, stack_variables()) == {
        "TRIPTYCH_FLIPP": "TRIPTYCH_FLIP",
        "TRIPTYCH_KVBYTES": "TRIPTYCH_KV_BYTES",
        "TRIPTYCH_ZZZ": None,
    }


def test_whatever_the_compose_file_gives_its_services_is_known() -> None:
    names = {
        name
        for service in read_stack({}).services.values()
        for name in service.environment
        if name.startswith("TRIPTYCH_")
    }
    # Those are filled in for each replica.
    assert names - stack_variables() == {"TRIPTYCH_INSTANCE", "TRIPTYCH_SLOT"}
    assert not unknown_variables(names - {"TRIPTYCH_SLOT"}, stack_variables() | settings_variables(SchedulerSettings))


def test_a_service_knows_its_own_settings_and_warns_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
        assert settings.heartbeat_s == 0.25

    monkeypatch.setenv("TRIPTYCH_HEARTBEAT_S", "0.25")
    monkeypatch.setenv("TRIPTYCH_FLIPP", "queue")
    try:
        run_service(SchedulerSettings, serve)
    finally:
        structlog.reset_defaults()
    (line,) = capsys.readouterr().err.splitlines()
    assert "level=warning" in line and "variable=TRIPTYCH_FLIPP nearest=TRIPTYCH_FLIP" in line


def test_triptych_up_warns_of_what_has_no_effect() -> None:
    options = StackOptions(port=9000)
    environment = {"TRIPTYCH_FLIPP": "queue", "TRIPTYCH_PORT": "8000", "TRIPTYCH_HOST": options.host}
    assert list(unknown(environment, options)) == [
        "triptych: warning: TRIPTYCH_FLIPP is no variable of this stack and has no effect; did you mean TRIPTYCH_FLIP?"
    ]
    assert list(overruled(environment, options)) == [
        "triptych: warning: TRIPTYCH_PORT has no effect here, use --port (which is 9000 now)"
    ]


def test_triptych_up_says_what_it_does_in_the_place_of_what_containers_are_told() -> None:
    environment = {
        "TRIPTYCH_NATS_HOST": "0.0.0.0",
        "TRIPTYCH_NATS_URL": "nats://elsewhere:4222",
        "TRIPTYCH_NATS_STORE": "/var/lib/nats",
        "TRIPTYCH_CACHE_DIR": "/var/lib/cache",
    }
    warning = "triptych: warning:"
    assert list(set_aside(environment, StackOptions())) == [
        f"{warning} TRIPTYCH_NATS_HOST has no effect here: the broker listens on 127.0.0.1",
        f"{warning} TRIPTYCH_NATS_URL has no effect here: the stack has its own broker; "
        "TRIPTYCH_NATS_PORT chooses its port on 127.0.0.1",
        f"{warning} TRIPTYCH_NATS_STORE has no effect here: "
        "the broker's files are kept in a temporary folder; use --state-dir",
        f"{warning} TRIPTYCH_CACHE_DIR has no effect here: "
        "the cache store's files are kept in a temporary folder; use --state-dir",
    ]
    kept = StackOptions(state_dir=Path("/srv/stack"))
    assert list(set_aside({"TRIPTYCH_CACHE_DIR": "/var/lib/cache"}, kept)) == [
        f"{warning} TRIPTYCH_CACHE_DIR has no effect here: "
        "the cache store's files are kept in /srv/stack/cache (by --state-dir)"
    ]
    as_it_is = {
        "TRIPTYCH_NATS_HOST": "127.0.0.1",
        "TRIPTYCH_NATS_PORT": "4222",
        "TRIPTYCH_NATS_URL": "nats://127.0.0.1:4222",
        "TRIPTYCH_NATS_STORE": "/srv/stack/nats",
        "TRIPTYCH_CACHE_DIR": "",
    }
    assert not list(set_aside(as_it_is, kept))
