"""What a DiT worker does between two steps, from what it has heard: grants, revocations, parking, calls."""

import pytest

from common.messages.tensors import TensorRef
from common.messages.video import Lease, VideoRequest
from common.policies.fence import StaleEpoch
from services.dit.book import GoOn, LeaseBook, Park, Stop, Switch

REQUEST = VideoRequest(
    model="demo", prompt="", width=64, height=64, frames=16, fps=8, steps=4, guidance_scale=2.0, seed=1
)
TEXT = TensorRef(owner="encoder-0", tensor_id=1, address=b"", shape=(1,), dtype="float32", size_bytes=4)


def start(epoch: int, *members: str, job_id: str = "a") -> Lease:
    return Lease(job_id=job_id, epoch=epoch, members=members, leader=members[0], request=REQUEST, text=TEXT)


def change(epoch: int, *members: str, job_id: str = "a") -> Lease:
    return Lease(job_id=job_id, epoch=epoch, members=members, leader=members[0], request=REQUEST)


def leading(*leases: Lease) -> LeaseBook:
    """The book of the first lease's leader, at work under it; the others were granted since."""
    book = LeaseBook(leases[0].leader)
    book.grant(leases[0])
    book.begin(leases[0])
    for lease in leases[1:]:
        book.grant(lease)
    return book


def test_without_news_the_lease_stays() -> None:
    lease = start(1, "w0")
    assert leading(lease).at_boundary(lease) == GoOn()


def test_a_newer_lease_of_the_job_is_gone_over_to_and_the_newest_of_several() -> None:
    first, second, third = start(1, "w0"), change(2, "w0", "w1"), change(3, "w0", "w2")
    book = leading(first, second)
    assert not book.void(first), "a changed lease is not a lost one"
    assert book.at_boundary(first) == Switch(second)
    book.grant(third)
    assert book.at_boundary(first) == Switch(third)
    book.begin(third)
    assert book.at_boundary(third) == GoOn()


def test_revoked_and_overtaken_leases_end() -> None:
    lease = start(1, "w0")
    book = leading(lease, change(2, "w0", "w1"))
    book.revoke("b", 9)
    assert book.at_boundary(lease) == Switch(change(2, "w0", "w1"))
    book.revoke("a", 2)
    assert book.at_boundary(lease) == Stop()
    for overtaking in (start(3, "w0", job_id="b"), start(3, "w0"), change(3, "w1", "w0", job_id="b")):
        assert leading(lease, overtaking).at_boundary(lease) == Stop()
    book = leading(lease)
    book.revoke(None, 5)
    assert book.at_boundary(lease) == Stop()


def test_one_that_was_taken_for_dead_gives_way_to_its_heir() -> None:
    lease = start(1, "w0", "w1")
    assert leading(lease, change(2, "w1", "w0")).at_boundary(lease) == Stop()


def test_parking_comes_before_a_change_and_ends_with_the_run() -> None:
    lease = start(1, "w0")
    book = leading(lease, change(2, "w0", "w1"))
    book.park("a", 2)
    assert book.at_boundary(lease) == Park()
    book.conclude()
    assert book.waiting() is None, "the change came too late"
    again = start(3, "w0")
    book.grant(again)
    assert book.waiting() == again
    book.begin(again)
    assert book.at_boundary(again) == GoOn(), "the order to park was for the run before"


def test_who_joins_begins_when_called() -> None:
    book = LeaseBook("w1")
    joining = change(2, "w0", "w1")
    book.grant(joining)
    assert book.waiting() is None
    book.call("a", 1)
    assert book.waiting() is None
    book.call("a", 2)
    assert book.waiting() == joining
    book.begin(joining)
    assert book.waiting() is None


def test_an_older_change_may_be_the_one_the_group_goes_over_to() -> None:
    book = LeaseBook("w1")
    first, second, third = start(1, "w0", "w1"), change(2, "w0", "w1"), change(3, "w0", "w1", "w2", "w3")
    book.grant(first)
    book.begin(first)
    book.grant(second)
    book.grant(third)
    assert book.change("a", 2) == second
    book.begin(second)
    assert book.change("a", 3) == third
    assert book.change("a", 4) is None, "a lease this worker is not in"


def test_after_a_break_only_a_lease_that_heals_will_do() -> None:
    lease = start(1, "w0", "w1")
    book = leading(lease, change(2, "w0", "w1", "w2", "w3"))
    assert book.waiting(lease) is None, "it may count on the dead"
    healing = change(3, "w0")
    book.grant(healing)
    assert book.waiting(lease) == healing
    book = LeaseBook("w1")
    book.grant(lease)
    book.begin(lease)
    # The leader died on its way to a wider group, with some that were to join it.
    joined = change(3, "w1", "w2")
    book.grant(joined)
    assert book.waiting(lease) == joined
    book = leading(lease)
    anew = start(4, "w0", "w1")
    book.grant(anew)
    assert book.waiting(lease) == anew


def test_an_heir_begins_on_its_own() -> None:
    book = LeaseBook("w1")
    lease, healing = start(1, "w0", "w1"), change(2, "w1")
    book.grant(lease)
    book.begin(lease)
    book.grant(healing)
    assert book.waiting(lease) == healing


def test_changes_after_the_end_come_too_late_unless_another_leads_the_job_by_then() -> None:
    lease = start(1, "w0")
    book = leading(lease)
    book.conclude()
    book.grant(change(2, "w0", "w1"))
    assert book.waiting() is None
    joining = change(7, "w3", "w0")
    book.grant(joining)
    book.call("a", 7)
    assert book.waiting() == joining


def test_the_next_job_may_come_before_the_last_one_is_over() -> None:
    lease, following = start(1, "w0"), start(2, "w0", job_id="b")
    book = leading(lease, following)
    book.conclude()
    assert book.waiting() == following


def test_a_lease_that_comes_twice_changes_nothing_and_an_old_one_is_refused() -> None:
    book = LeaseBook("w0")
    lease = start(5, "w0")
    book.grant(lease)
    book.grant(lease)
    assert book.waiting() == lease
    book.begin(lease)
    book.grant(lease)
    assert book.waiting() is None, "its answer was lost, and it is at work under it"
    with pytest.raises(StaleEpoch):
        book.grant(start(4, "w0"))
