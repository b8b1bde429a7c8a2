"""A worker's fence: what it may still accept."""

import pytest

from common.policies.fence import Fence, StaleEpoch


def test_an_older_grant_is_refused() -> None:
    fence = Fence()
    fence.admit("a", 5)
    for stale in (5, 4):
        with pytest.raises(StaleEpoch, match=f"epoch {stale}"):
            fence.admit("b", stale)
    assert fence.holds("a", 5)


def test_a_newer_grant_overtakes() -> None:
    fence = Fence()
    fence.admit("a", 5)
    fence.admit("b", 6)
    assert not fence.holds("a", 5)
    assert fence.holds("b", 6)


def test_revoking_voids_what_was_granted() -> None:
    fence = Fence()
    fence.admit("a", 5)
    fence.revoke("b", 9)
    assert fence.holds("a", 5)
    fence.revoke("a", 4)
    assert fence.holds("a", 5)
    fence.revoke("a", 5)
    assert not fence.holds("a", 5)


def test_a_revocation_that_overtakes_its_grant_wins() -> None:
    fence = Fence()
    fence.revoke("a", 7)
    with pytest.raises(StaleEpoch):
        fence.admit("a", 7)
    fence.admit("b", 8)
    assert fence.holds("b", 8)


def test_a_new_scheduler_clears_everything_before_it() -> None:
    fence = Fence()
    fence.admit("a", 5)
    fence.revoke(None, 100)
    assert not fence.holds("a", 5)
    with pytest.raises(StaleEpoch):
        fence.admit("b", 100)
    fence.admit("b", 101)
    assert fence.holds("b", 101)


def test_what_was_swept_away_with_all_others_is_told_from_what_was_meant() -> None:
    fence = Fence()
    fence.admit("a", 5)
    assert not fence.swept("a", 5)
    fence.revoke(None, 9)
    assert fence.swept("a", 5) and not fence.swept("a", 10)
    fence.revoke("a", 5)
    assert not fence.swept("a", 5)


def test_memory_of_revocations_is_bounded() -> None:
    fence = Fence()
    for number in range(5000):
        fence.revoke(f"job-{number}", number)
    assert len(fence._revoked) <= 1024


def test_what_was_followed_is_not_void_and_what_was_revoked_is() -> None:
    fence = Fence()
    fence.admit("a", 5)
    fence.admit("a", 6)
    assert not fence.void("a", 5)
    fence.revoke("a", 5)
    assert fence.void("a", 5)
    assert not fence.void("a", 6)
    fence.revoke(None, 9)
    assert fence.void("b", 9)
