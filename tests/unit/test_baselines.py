"""What defines each baseline: groups cut in advance, isolation, and the two preemptive orders."""

import pytest

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.ddit import DynamicPartition
from common.policies.video.policy import Policy
from common.policies.video.preemptive import EarliestDeadlineFirst, ShortestRemainingTimeFirst
from common.policies.video.registry import UnknownPolicy, make_policy, policy_names
from common.policies.video.rib import VideoKind
from common.policies.video.state import Phase
from common.policies.video.static_groups import OptimalPartition, StaticDegree, StaticPartition
from tests.support.policies import LARGE, MIDDLE, SMALL, STEPS, arrive, cluster, leases


def finish(policy: Policy, job_id: str, at_s: float = 9.0) -> list[decide.Decision]:
    epoch = policy.state.jobs[job_id].epoch
    policy.handle(event.DenoisingFinished(job_id, epoch), at_s)
    return policy.handle(event.DecodingFinished(job_id, epoch), at_s)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_sdop_runs_every_video_on_a_group_of_one_size(degree: int) -> None:
    policy = cluster(StaticDegree(degree), 8)
    for at, size in enumerate((SMALL, LARGE, MIDDLE)):
        grants = leases(arrive(policy, f"video-{at}", size))
        if (at + 1) * degree <= 8:
            assert grants == {f"video-{at}": tuple(range(at * degree, (at + 1) * degree))}
        else:
            assert grants == {}


def test_sdop_waits_for_a_whole_group_and_holds_it_through_the_decoding() -> None:
    policy = cluster(StaticDegree(4), 6)
    assert leases(arrive(policy, "a", LARGE)) == {"a": (0, 1, 2, 3)}
    assert leases(arrive(policy, "b", SMALL)) == {}, "two free slots are no group of four"
    policy.handle(event.DenoisingFinished("a", policy.state.jobs["a"].epoch), 5.0)
    assert policy.state.jobs["a"].slots == (0, 1, 2, 3)
    assert leases(policy.handle(event.DecodingFinished("a", policy.state.jobs["a"].epoch), 6.0)) == {"b": (0, 1, 2, 3)}


def test_sdop_groups_never_span_servers() -> None:
    policy = cluster(StaticDegree(2), 3, 3)
    assert leases(arrive(policy, "a", LARGE)) == {"a": (0, 1)}
    assert leases(arrive(policy, "b", LARGE)) == {"b": (3, 4)}
    assert leases(arrive(policy, "c", LARGE)) == {}


def test_a_group_with_a_dead_worker_is_not_given_out_until_it_is_back() -> None:
    policy = cluster(StaticDegree(2), 4)
    arrive(policy, "a", SMALL)
    finish(policy, "a")
    policy.handle(event.WorkerLost("dit-1"), 2.0)
    assert leases(arrive(policy, "b", SMALL, 3.0)) == {"b": (2, 3)}
    assert leases(arrive(policy, "c", SMALL, 3.1)) == {}
    assert leases(policy.handle(event.WorkerJoined("dit-1", Service.DIT, 1, "server-0"), 4.0)) == {"c": (0, 1)}


@pytest.mark.parametrize(("policy", "sizes"), [(StaticPartition, (2, 2, 2)), (OptimalPartition, (1, 2, 4))])
def test_isolated_classes_have_groups_of_their_own(policy: type[StaticPartition], sizes: tuple[int, ...]) -> None:
    mix = {VideoKind(*size, 51): 1.0 for size in (SMALL, MIDDLE, LARGE)}
    made = cluster(policy(1, None, mix), 8)
    for size, degree in zip((SMALL, MIDDLE, LARGE), sizes, strict=True):
        (slots,) = leases(arrive(made, f"first-{size[1]}", size)).values()
        assert len(slots) == degree
    # The small ones fill what is theirs; nothing is borrowed.
    held = [len(leases(arrive(made, f"small-{at}", SMALL))) for at in range(8)]
    assert sum(held) < 8
    assert {kind.width for kind in made.shares()} == {256, 426, 640}


def test_no_class_borrows_and_none_blocks_another() -> None:
    mix = {VideoKind(*SMALL, 51): 1.0, VideoKind(*LARGE, 51): 1.0}
    policy = cluster(OptimalPartition(1, None, mix), 8)
    assert leases(arrive(policy, "large-0", LARGE)) == {"large-0": (0, 1, 2, 3)}
    for at in range(1, 10):
        assert leases(arrive(policy, f"large-{at}", LARGE)) == {}, "the other four belong to the small ones"
    assert len(leases(arrive(policy, "small", SMALL))) == 1


def test_without_a_given_mix_the_split_follows_what_has_come() -> None:
    policy = cluster(OptimalPartition(), 8)
    assert leases(arrive(policy, "small-0", SMALL)) == {"small-0": (0,)}
    for at in range(1, 7):
        arrive(policy, f"small-{at}", SMALL)
    for at in range(7):
        finish(policy, f"small-{at}")
    # A class that is new gets its share from then on.
    (slots,) = leases(arrive(policy, "large", LARGE, 20.0)).values()
    assert len(slots) == 4


def test_a_class_for_which_nothing_is_left_shares_with_the_richest() -> None:
    policy = cluster(OptimalPartition(), 1)
    for name, size in (("small", SMALL), ("middle", MIDDLE), ("large", LARGE)):
        arrive(policy, name, size)
    done = []
    for _ in range(3):
        (running,) = [job.job_id for job in policy.state.jobs.values() if job.phase is Phase.DENOISING]
        done.append(running)
        finish(policy, running)
    assert sorted(done) == ["large", "middle", "small"]


def test_dp_starts_lower_than_the_optimum_keeps_that_degree_and_its_group() -> None:
    policy = cluster(DynamicPartition(), 4)
    arrive(policy, "middle", MIDDLE)
    assert leases(arrive(policy, "large", LARGE)) == {"large": (2, 3)}
    assert leases(finish(policy, "middle")) == {}, "no promotion"
    policy.handle(event.DenoisingFinished("large", policy.state.jobs["large"].epoch), 9.0)
    assert policy.state.jobs["large"].slots == (2, 3), "held through the decoding"


def test_srtf_parks_the_longest_for_a_shorter_one_and_goes_on_from_its_step() -> None:
    policy = cluster(ShortestRemainingTimeFirst(), 4)
    arrive(policy, "long", LARGE, 0.0)
    decisions = arrive(policy, "short", SMALL, 0.5)
    (park,) = [one for one in decisions if isinstance(one, decide.ParkJob)]
    assert (park.job_id, park.members) == ("long", ("dit-0", "dit-1", "dit-2", "dit-3"))
    assert "short" in park.reason
    assert policy.state.jobs["long"].slots == (0, 1, 2, 3), "held until the latent is parked"
    grants = policy.handle(event.JobParked("long", park.epoch, 3), 0.6)
    assert leases(grants) == {"short": (0,), "long": (2, 3)}, "what the short one does not need goes on at once"
    (again,) = [one for one in grants if isinstance(one, decide.GrantLease) and one.job_id == "long"]
    assert again.from_step == 3 and again.epoch > park.epoch


def test_srtf_lets_a_video_that_is_nearly_done_finish() -> None:
    policy = cluster(ShortestRemainingTimeFirst(), 1)
    arrive(policy, "long", LARGE, 0.0)
    assert not [one for one in arrive(policy, "short", SMALL, 17.0) if isinstance(one, decide.ParkJob)]


def test_srtf_takes_the_shortest_waiting_first() -> None:
    policy = cluster(ShortestRemainingTimeFirst(), 1)
    arrive(policy, "running", SMALL, 0.0)
    arrive(policy, "large", LARGE, 0.1)
    arrive(policy, "middle", MIDDLE, 0.2)
    assert policy.queue_places() == {"middle": 1, "large": 2}
    assert list(leases(finish(policy, "running", 3.2))) == ["middle"]


def test_edf_goes_by_deadlines_and_preempts_by_them() -> None:
    policy = cluster(EarliestDeadlineFirst(), 1)
    arrive(policy, "relaxed", SMALL, 0.0, deadline_s=100.0)
    assert not [one for one in arrive(policy, "later", SMALL, 0.1, deadline_s=200.0) if isinstance(one, decide.ParkJob)]
    decisions = arrive(policy, "urgent", LARGE, 0.2, deadline_s=50.0)
    assert [one.job_id for one in decisions if isinstance(one, decide.ParkJob)] == ["relaxed"]
    park_epoch = policy.state.jobs["relaxed"].epoch
    assert list(leases(policy.handle(event.JobParked("relaxed", park_epoch, 1), 0.4))) == ["urgent"]
    assert policy.queue_places() == {"relaxed": 1, "later": 2}


def test_a_job_that_ends_before_it_is_parked_is_decoded() -> None:
    policy = cluster(ShortestRemainingTimeFirst(), 1)
    arrive(policy, "long", LARGE, 0.0)
    arrive(policy, "short", SMALL, 0.5)
    epoch = policy.state.jobs["long"].epoch
    decisions = policy.handle(event.DenoisingFinished("long", epoch), 0.7)
    assert [type(one) for one in decisions] == [decide.StartDecoding]
    assert policy.handle(event.JobParked("long", epoch, 30), 0.8) == [], "too late"
    assert list(leases(policy.handle(event.DecodingFinished("long", epoch), 1.5))) == ["short"]


@pytest.mark.parametrize("name", ["srtf", "elastic"])
def test_those_left_of_a_group_that_was_to_be_parked_go_on(name: str) -> None:
    policy = cluster(make_policy(name), 4)
    arrive(policy, "long", LARGE, 0.0)
    job = policy.state.jobs["long"]
    policy.handle(event.StepFinished("long", job.epoch, 1), 0.3)
    park = policy.park_job(job, "for the test")
    (grant, *_) = policy.handle(event.WorkerLost("dit-0"), 0.5)
    assert isinstance(grant, decide.GrantLease) and (grant.leader, grant.from_step) == ("dit-1", 1)
    assert (job.phase, job.parking, job.attempt) == (Phase.DENOISING, False, 1)
    # The lost one had parked it after all: the heirs' step, if there was one, is done again.
    decisions = policy.handle(event.JobParked("long", park.epoch, 2), 0.6)
    assert isinstance(decisions[0], decide.RevokeLease) and decisions[0].members == grant.members
    again = [one for one in decisions if isinstance(one, decide.GrantLease)]
    assert [(one.job_id, one.from_step) for one in again] == [("long", 2)]
    policy.handle(event.DenoisingFinished("long", again[0].epoch), 9.0)
    policy.handle(event.DecodingFinished("long", again[0].epoch), 9.5)
    assert policy.state.jobs == {} and policy.state.placement.free_count == 3


@pytest.mark.parametrize("name", ["ddit", "srtf", "elastic", "fifo", "sdop:1", "dpci"])
def test_a_higher_priority_goes_first_whatever_the_policy(name: str) -> None:
    policy = cluster(make_policy(name), 1)
    arrive(policy, "running", SMALL, 0.0)
    arrive(policy, "usual", SMALL, 0.1)
    policy.handle(event.JobArrived("important", 0.2, *SMALL, 51, STEPS, priority=1), 0.2)
    important = policy.state.jobs["important"]
    if important.phase is Phase.ENCODING:
        policy.handle(event.PromptEncoded("important", 1), 0.2)
    if important.phase is Phase.WAITING:
        # Embeddings are kept for no more videos than there are slots; its turn comes with the next one.
        assert policy.queue_places()["important"] == 2
        return
    if policy.state.jobs["running"].parking:
        epoch = policy.state.jobs["running"].epoch
        assert list(leases(policy.handle(event.JobParked("running", epoch, 1), 0.3))) == ["important"]
        return
    assert policy.queue_places() == {"important": 1, "usual": 2}


def test_every_listed_name_makes_a_policy_of_that_name() -> None:
    for name in policy_names():
        assert make_policy(name).name == name
    assert make_policy("sdop:16").name == "sdop:16"
    for wrong in ("sdop:3", "sdop:0", "sdop:", "sdop:x", "best"):
        with pytest.raises(UnknownPolicy, match="elastic"):
            make_policy(wrong)
