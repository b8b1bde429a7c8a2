"""A tier of the cache store: never above its size, least recently used goes first, pinned stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.tier import Held, Tier, TierFull


def tier_of(capacity: int, **sizes: int) -> Tier:
    tier = Tier(capacity)
    for key, size in sizes.items():
        tier.admit(key, Held(1, size), 0.0)
    return tier


def test_the_least_recently_used_goes_first() -> None:
    tier = tier_of(10, a=4, b=3, c=3)
    tier.used("a")
    assert tier.admit("d", Held(1, 3), 0.0) == ["b"]
    assert tier.admit("e", Held(1, 6), 0.0) == ["c", "a"]
    assert tier.used_bytes == 9


def test_a_new_version_takes_the_place_of_the_old_one() -> None:
    tier = tier_of(10, a=6, b=4)
    assert tier.admit("a", Held(2, 5), 0.0) == []
    assert (tier.held("a"), tier.used_bytes) == (Held(2, 5), 9)
    assert tier.admit("b", Held(2, 6), 0.0) == ["a"]


def test_what_is_pinned_stays_until_its_pin_has_run_out() -> None:
    tier = Tier(10)
    tier.admit("pinned", Held(1, 6, pinned_until_s=100.0), 0.0)
    tier.admit("free", Held(1, 4), 0.0)
    assert tier.admit("new", Held(1, 4), 50.0) == ["free"]
    with pytest.raises(TierFull):
        tier.check_room("large", 5, 99.0)
    with pytest.raises(TierFull):
        tier.admit("large", Held(1, 5), 99.0)
    assert (tier.held("new"), tier.held("large"), tier.used_bytes) == (Held(1, 4), None, 10)
    assert tier.admit("large", Held(1, 5), 100.0) == ["pinned"]


def test_what_is_larger_than_the_tier_changes_nothing() -> None:
    tier = tier_of(10, a=4)
    with pytest.raises(TierFull):
        tier.admit("b", Held(1, 11), 0.0)
    with pytest.raises(TierFull):
        tier.admit("a", Held(2, 11), 0.0)
    assert tier.held("a") == Held(1, 4)


actions = st.tuples(st.sampled_from("abcdef"), st.integers(0, 12), st.sampled_from([0.0, 5.0, 1000.0]))


@given(st.lists(actions, max_size=60))
def test_it_is_never_above_its_size_and_never_loses_what_is_pinned(steps: list[tuple[str, int, float]]) -> None:
    tier = Tier(20)
    known: dict[str, Held] = {}
    for now, (key, size, pinned_until_s) in enumerate(steps):
        held = Held(now, size, pinned_until_s)
        try:
            evicted = tier.admit(key, held, float(now))
        except TierFull:
            continue
        assert all(known.pop(gone).pinned_until_s <= now for gone in evicted)
        known[key] = held
        assert {name: tier.held(name) for name in known} == known
        assert tier.used_bytes == sum(each.size_bytes for each in known.values()) <= 20
        assert len(tier) == len(known)
