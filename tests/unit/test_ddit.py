"""DDiT's greedy allocation on hand-written event sequences, by the paper's table: B is 1, 2 and 4."""

import pytest

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.ddit import Ddit, DditNoDecoupling, DditNoPromotion, DditWaitingFirst, starvation_time
from common.policies.video.policy import Policy
from common.policies.video.rib import paper_rib
from common.policies.video.state import Phase
from tests.support.policies import LARGE, MIDDLE, SMALL, STEPS, cluster


def arrive(policy: Policy, job_id: str, size: tuple[int, int], at_s: float = 1.0) -> list[decide.Decision]:
    """A video comes and its prompt is encoded at once."""
    policy.handle(event.JobArrived(job_id, at_s, *size, 51, STEPS), at_s)
    job = policy.state.jobs[job_id]
    return policy.handle(event.PromptEncoded(job_id, job.attempt), at_s) if job.phase is Phase.ENCODING else []


def leases(decisions: list[decide.Decision]) -> dict[str, tuple[int, ...]]:
    return {one.job_id: one.slots for one in decisions if isinstance(one, decide.GrantLease)}


def epoch(policy: Policy, job_id: str) -> int:
    return policy.state.jobs[job_id].epoch


def step(policy: Policy, job_id: str, number: int, at_s: float = 2.0, heard: bool = True) -> list[decide.Decision]:
    """The step ends; its leader goes on under the newest lease, or has not heard of it."""
    job = policy.state.jobs[job_id]
    return policy.handle(event.StepFinished(job_id, job.settled_epoch, number, job.epoch if heard else None), at_s)


def denoise(policy: Policy, job_id: str, at_s: float = 9.0) -> list[decide.Decision]:
    return policy.handle(event.DenoisingFinished(job_id, epoch(policy, job_id)), at_s)


def decode(policy: Policy, job_id: str, at_s: float = 10.0) -> list[decide.Decision]:
    return policy.handle(event.DecodingFinished(job_id, epoch(policy, job_id)), at_s)


def test_a_newcomer_gets_its_optimal_degree_and_never_more() -> None:
    policy = cluster(Ddit(), 8)
    assert leases(arrive(policy, "large", LARGE)) == {"large": (0, 1, 2, 3)}
    assert leases(arrive(policy, "middle", MIDDLE)) == {"middle": (4, 5)}
    assert leases(arrive(policy, "small", SMALL)) == {"small": (6,)}
    assert [slot.number for slot in policy.state.free_for_denoising()] == [7]
    assert step(policy, "large", 1) == []
    assert list(policy.watched()) == []


def test_a_newcomer_never_waits_for_its_full_degree() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "first", MIDDLE)
    (grant,) = arrive(policy, "second", LARGE)
    assert isinstance(grant, decide.GrantLease)
    assert grant.slots == (2, 3) and "hungry for 4" in grant.reason


def test_with_three_free_and_four_wanted_the_largest_power_of_two_is_taken() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "small", SMALL)
    assert leases(arrive(policy, "large", LARGE)) == {"large": (2, 3)}
    assert [slot.number for slot in policy.state.free_for_denoising()] == [1]
    # One more slot beside it makes no power of two ...
    assert leases(denoise(policy, "small")) == {}
    assert step(policy, "large", 1) == []
    # ... two do, aligned or not; the master keeps its place at the head.
    assert leases(decode(policy, "small")) == {"large": (2, 0, 1, 3)}
    job = policy.state.jobs["large"]
    assert job.members[0] == "dit-2" and sorted(job.slots) == [0, 1, 2, 3]


def test_a_group_grows_to_its_buddy_where_that_is_free() -> None:
    policy = cluster(Ddit(), 8)
    for name in ("a", "b"):
        arrive(policy, name, LARGE)
    for name in ("c", "d"):
        assert leases(arrive(policy, name, LARGE)) == {}
    denoise(policy, "a")  # frees 1, 2, 3
    job_c = policy.state.jobs["c"]
    assert job_c.slots == (2, 3), "an aligned pair, not 1 and 2"
    assert policy.state.jobs["d"].slots == (1,)
    grown = leases(decode(policy, "a"))
    assert grown == {"d": (1, 0)}, "d has one, c needs two: the freed slot is d's buddy"


def test_a_group_never_spans_servers() -> None:
    policy = cluster(Ddit(), 2, 4)
    assert leases(arrive(policy, "large", LARGE)) == {"large": (2, 3, 4, 5)}
    assert leases(arrive(policy, "next", LARGE)) == {"next": (0, 1)}
    denoise(policy, "large")
    assert leases(decode(policy, "large")) == {}, "four are free, but in the other server"
    # It is left out of the optimum that its server cannot give.
    assert policy.best_degree(policy.state.jobs["next"]) == 4
    assert list(policy.watched()) == []


def test_promotion_takes_effect_at_the_next_step_boundary() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "middle", MIDDLE)
    arrive(policy, "large", LARGE)
    first = policy.state.jobs["large"].epoch
    denoise(policy, "middle")
    for number in range(1, 6):
        assert step(policy, "large", number) == []
    (done, grant) = decode(policy, "middle")
    assert isinstance(done, decide.CompleteJob) and isinstance(grant, decide.GrantLease)
    assert grant.slots == (2, 0, 1, 3) and grant.epoch > first and grant.from_step == 5
    job = policy.state.jobs["large"]
    assert len(job.active) == 2 and sorted(job.slots) == [0, 1, 2, 3], "held at once, in use from the boundary on"
    # The step under way still counts, though its lease is older; the leader had not heard yet.
    assert policy.handle(event.StepFinished("large", first, 6), 11.0) == []
    assert (job.step, job.last_step, len(job.active)) == (6, 0, 2)
    assert policy.handle(event.StepFinished("large", first, 7, grant.epoch), 11.3) == []
    assert (job.step, job.last_step, len(job.active)) == (7, 7, 4)


def test_starvation_time_is_what_was_lost_since_the_last_grant() -> None:
    policy = cluster(Ddit(), 2)
    arrive(policy, "large", LARGE)
    for number in range(1, 11):
        step(policy, "large", number)
    job = policy.state.jobs["large"]
    assert starvation_time(paper_rib(), job, 4) == pytest.approx(10 * (0.615 * 0.54 - 0.615 * 0.286))
    assert starvation_time(paper_rib(), job, 2) == 0.0
    job.last_step = 10
    assert starvation_time(paper_rib(), job, 4) == 0.0


def two_hungry() -> Policy:
    """Six slots: a holder of four, and two large videos on one slot each, the earlier one less starved."""
    policy = cluster(Ddit(), 6)
    arrive(policy, "holder", LARGE, 1.0)
    policy.handle(event.WorkerDraining("dit-5"), 1.1)
    arrive(policy, "early", LARGE, 1.2)
    policy.handle(event.WorkerJoined("dit-5", Service.DIT, 5, "server-0"), 1.3)
    arrive(policy, "late", LARGE, 1.4)
    return policy


def test_of_two_hungry_videos_the_more_starved_is_served_first() -> None:
    policy = two_hungry()
    # The slot that came back went to the hungry one at once; the newcomer waits (hungry before waiting).
    assert policy.state.jobs["early"].slots == (4, 5)
    assert policy.state.jobs["late"].phase is Phase.ENCODED
    step(policy, "early", 1)
    grants = leases(denoise(policy, "holder"))
    # Three are free: the hungry one takes two of them, the waiting one the third.
    assert grants == {"early": (4, 2, 3, 5), "late": (1,)}
    # Now both could use more, but one of them has all it wants.
    assert leases(decode(policy, "holder")) == {"late": (1, 0)}


def test_two_hungry_videos_compete_by_starvation_time() -> None:
    policy = cluster(Ddit(), 4)
    for name, slot in (("a", 0), ("b", 1), ("c", 2), ("d", 3)):
        assert leases(arrive(policy, name, SMALL)) == {name: (slot,)}
    arrive(policy, "first", LARGE, 2.0)
    arrive(policy, "second", LARGE, 3.0)
    denoise(policy, "a")
    decode(policy, "a")
    denoise(policy, "b")
    policy.handle(event.WorkerDraining("dit-0"), 4.0)
    assert policy.state.jobs["first"].slots == (0,)
    decode(policy, "b")
    # Slot 1 makes "first" whole pairs: (0, 1). The second one starts with what comes next.
    assert policy.state.jobs["first"].slots == (0, 1)
    denoise(policy, "c")
    decode(policy, "c")
    assert policy.state.jobs["second"].slots == (2,)
    assert sorted(policy.watched()) == ["first", "second"]
    step(policy, "first", 1)
    for number in range(1, 4):
        step(policy, "second", number)
    denoise(policy, "d")
    (done, grant) = decode(policy, "d")
    assert isinstance(done, decide.CompleteJob) and isinstance(grant, decide.GrantLease)
    assert (grant.job_id, grant.slots) == ("second", (2, 3))
    assert "starved" in grant.reason


def test_nothing_is_taken_from_a_running_video_for_a_newcomer() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "large", LARGE)
    assert arrive(policy, "small", SMALL) == []
    assert policy.state.jobs["large"].slots == (0, 1, 2, 3)


def test_all_but_the_master_are_free_when_denoising_ends() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "large", LARGE)
    for name in ("u", "v", "w", "x"):
        arrive(policy, name, SMALL)
    decisions = denoise(policy, "large")
    assert isinstance(decisions[0], decide.StartDecoding) and decisions[0].slot == 0
    # Single slots come out of the smallest gap first, so that the pair 2 and 3 stays whole the longest.
    assert leases(decisions) == {"u": (1,), "v": (2,), "w": (3,)}
    assert leases(decode(policy, "large")) == {"x": (0,)}


@pytest.mark.parametrize(
    ("policy", "expected"), [(Ddit(), {"hungry": (3, 2)}), (DditWaitingFirst(), {"waiting": (2,)})]
)
def test_hungry_before_waiting_and_the_other_way_round(policy: Policy, expected: dict[str, tuple[int, ...]]) -> None:
    cluster(policy, 4)
    arrive(policy, "middle", MIDDLE)
    arrive(policy, "small", SMALL)
    assert leases(arrive(policy, "hungry", MIDDLE)) == {"hungry": (3,)}
    assert arrive(policy, "waiting", SMALL) == []
    denoise(policy, "small")
    assert leases(decode(policy, "small")) == expected


def test_without_promotion_the_degree_stays() -> None:
    policy = cluster(DditNoPromotion(), 4)
    arrive(policy, "middle", MIDDLE)
    arrive(policy, "large", LARGE)
    denoise(policy, "middle")
    assert leases(decode(policy, "middle")) == {}
    assert policy.state.jobs["large"].slots == (2, 3)


def test_without_decoupling_the_group_is_held_until_it_is_decoded() -> None:
    policy = cluster(DditNoDecoupling(), 4)
    arrive(policy, "large", LARGE)
    arrive(policy, "small", SMALL)
    decisions = denoise(policy, "large")
    assert [type(one) for one in decisions] == [decide.StartDecoding]
    assert policy.state.jobs["large"].slots == (0, 1, 2, 3)
    assert leases(decode(policy, "large")) == {"small": (0,)}


def test_those_left_of_a_group_go_on_when_a_member_is_lost() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "large", LARGE)
    step(policy, "large", 1)
    step(policy, "large", 2)
    (grant,) = policy.handle(event.WorkerLost("dit-0"), 3.0)
    assert isinstance(grant, decide.GrantLease)
    assert (grant.slots, grant.leader, grant.from_step) == ((1, 2), "dit-1", 2)
    assert policy.state.jobs["large"].attempt == 1
    # The fourth is stuck in the broken step until the others go on without it.
    assert sorted(policy.state.jobs["large"].slots) == [1, 2, 3]
    assert step(policy, "large", 3) == [] or policy.state.jobs["large"].slots[:2] == (1, 2)
    assert policy.state.jobs["large"].step == 3


def test_a_master_lost_while_its_group_grows_is_followed_by_one_that_has_the_latent() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "middle", MIDDLE)
    arrive(policy, "large", LARGE)
    step(policy, "large", 1)
    denoise(policy, "middle")
    decode(policy, "middle")
    job = policy.state.jobs["large"]
    assert (job.active, job.lease) == ((2, 3), (2, 0, 1, 3))
    # The report of its last step on two slots; those who join are called now.
    policy.handle(event.StepFinished("large", job.settled_epoch, 2, next_epoch=job.epoch), 12.0)
    assert (job.active, job.holders) == ((2, 0, 1, 3), (2, 3))
    (grant,) = policy.handle(event.WorkerLost("dit-2"), 13.0)
    assert isinstance(grant, decide.GrantLease)
    assert (grant.slots, grant.leader) == ((3, 0), "dit-3")


def test_a_group_that_has_not_done_a_step_starts_again_when_a_member_is_lost() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "large", LARGE)
    decisions = policy.handle(event.WorkerLost("dit-3"), 1.1)
    assert [type(one).__name__ for one in decisions] == ["RevokeLease", "RequeueJob", "StartEncoding"]


def test_a_lost_master_costs_the_steps_since_the_checkpoint() -> None:
    policy = cluster(Ddit(), 1)
    arrive(policy, "small", SMALL)
    for number in range(1, 8):
        step(policy, "small", number)
    assert policy.handle(event.CheckpointStored("small", 5), 2.0) == []
    policy.handle(event.WorkerLost("dit-0"), 3.0)
    policy.handle(event.WorkerJoined("dit-0", Service.DIT, 0, "server-0"), 4.0)
    (grant,) = policy.handle(event.PromptEncoded("small", 2), 4.1)
    assert isinstance(grant, decide.GrantLease) and grant.from_step == 5


def test_denoising_that_ends_before_a_promotion_takes_effect_is_decoded_under_its_own_lease() -> None:
    policy = cluster(Ddit(), 4)
    arrive(policy, "middle", MIDDLE)
    arrive(policy, "large", LARGE)
    ran_under = epoch(policy, "large")
    denoise(policy, "middle")
    decode(policy, "middle")
    assert epoch(policy, "large") > ran_under
    decisions = policy.handle(event.DenoisingFinished("large", ran_under), 12.0)
    (start,) = [one for one in decisions if isinstance(one, decide.StartDecoding)]
    assert (start.epoch, start.slot) == (ran_under, 2)
    assert [type(one) for one in policy.handle(event.DecodingFinished("large", ran_under), 13.0)] == [
        decide.CompleteJob
    ]
    assert policy.state.placement.free_count == 4
