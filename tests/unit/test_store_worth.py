"""When a fetch from a cache store is worth it, by what was measured; and what of a prefix is stored, in which order."""

import pytest

from common.language.settings import KVStore
from common.language.storing import lacking
from common.language.worth import FIRST_PAUSE_S, LONGEST_PAUSE_S, PATIENCE_S, Worth

TOKEN_BYTES = 4000  # 10 microseconds each, until measured


def worth_of(mode: KVStore = KVStore.ON, least: int = 64) -> Worth:
    return Worth(mode, TOKEN_BYTES, least, most_s=10.0)


def test_by_what_computing_and_fetching_took() -> None:
    worth = worth_of()
    # Nothing is known of computing.
    assert worth.pays(64, 0.0) and not worth.pays(63, 0.0)
    assert worth.patience_s(64) == PATIENCE_S
    for _ in range(3):
        worth.computed(500, 0.05)
    # Too small a step says nothing.
    worth.computed(8, 5.0)
    # 100 microseconds a token: 5 ms of round trips are soon made up for.
    assert worth.patience_s(1000) == pytest.approx(0.1)
    assert worth.pays(1000, 0.0) and not worth.pays(80, 0.0)
    for _ in range(8):
        worth.fetched(1000, 0.1)
    assert not worth.pays(1000, 0.0)
    # The quickest of the last counts.
    worth.fetched(1000, 0.02)
    assert worth.pays(1000, 0.0)


def test_failures_make_for_ever_longer_pauses() -> None:
    worth = worth_of()
    now_s = 100.0
    pause_s = FIRST_PAUSE_S
    for _ in range(10):
        worth.failed(now_s)
        assert not worth.pays(1000, now_s + 0.9 * pause_s) and worth.pays(1000, now_s + pause_s)
        now_s += pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    worth.fetched(1000, 0.02)
    worth.failed(now_s)
    assert worth.pays(1000, now_s + FIRST_PAUSE_S)


def test_never_and_always() -> None:
    never, always = worth_of(KVStore.OFF), worth_of(KVStore.ALWAYS)
    for worth in (never, always):
        worth.computed(1000, 1e-6)
        worth.failed(0.0)
    assert not never.pays(10**6, 0.0)
    assert always.pays(64, 0.0) and not always.pays(63, 0.0) and always.patience_s(64) == 10.0


@pytest.mark.parametrize(
    ("had", "runs"),
    [
        ("", []),
        ("111", []),
        ("000", [(0, 3)]),
        ("1000", [(1, 4)]),
        ("00000", [(2, 5), (0, 2)]),
        ("1010011", [(3, 5), (1, 2)]),
    ],
)
def test_what_a_store_lacks_is_put_in_runs_the_end_first(had: str, runs: list[tuple[int, int]]) -> None:
    assert [(run.start, run.stop) for run in lacking([one == "1" for one in had], 3)] == runs
