"""Elastic: what defines it, on hand-written sequences. Times by the paper's table; steps end when a test says so."""

import math

import pytest

from common.policies import decisions as decide
from common.policies import events as event
from common.policies.elastic import LEAST_WEIGHT, MOST_WEIGHT, ArrivalRate, Elastic
from common.policies.state import Phase
from tests.support.policies import LARGE, MIDDLE, SMALL, arrive, cluster, leases


def boundary(policy: Elastic, job_id: str, step: int, at_s: float) -> list[decide.Decision]:
    job = policy.state.jobs[job_id]
    return policy.handle(event.StepFinished(job_id, job.settled_epoch, step, job.epoch), at_s)


def finish(policy: Elastic, job_id: str, at_s: float) -> list[decide.Decision]:
    epoch = policy.state.jobs[job_id].epoch
    decisions = policy.handle(event.DenoisingFinished(job_id, epoch), at_s)
    return decisions + policy.handle(event.DecodingFinished(job_id, epoch), at_s)


def test_alone_a_video_has_all_gpus_that_make_it_faster() -> None:
    assert leases(arrive(cluster(Elastic(), 8), "large", LARGE, 0.0)) == {"large": tuple(range(8))}, (
        "beyond B, which is 4"
    )
    assert leases(arrive(cluster(Elastic(), 8), "middle", MIDDLE, 0.0)) == {"middle": (0, 1, 2, 3)}, "8 would be slower"
    assert leases(arrive(cluster(Elastic(), 8), "small", SMALL, 0.0)) == {"small": (0,)}, "2 are no faster"


def test_a_newcomer_takes_half_at_the_next_step_boundary() -> None:
    policy = cluster(Elastic(), 8)
    arrive(policy, "first", LARGE, 0.0)
    (shrink,) = arrive(policy, "second", LARGE, 0.5)[-1:]
    assert isinstance(shrink, decide.GrantLease)
    assert (shrink.job_id, shrink.slots) == ("first", (0, 1, 2, 3))
    assert len(policy.state.jobs["first"].slots) == 8, "held until the boundary"
    grants = boundary(policy, "first", 5, 0.6)
    assert leases(grants) == {"second": (4, 5, 6, 7)}


def test_what_a_video_leaves_goes_to_those_that_run() -> None:
    policy = cluster(Elastic(), 8)
    arrive(policy, "first", LARGE, 0.0)
    arrive(policy, "second", LARGE, 0.5)
    boundary(policy, "first", 5, 0.6)
    grants = leases(finish(policy, "second", 3.0))
    assert sorted(grants["first"]) == list(range(8))
    assert grants["first"][0] == 0, "the master stays"


def test_a_video_that_is_nearly_done_is_left_alone() -> None:
    policy = cluster(Elastic(), 8)
    arrive(policy, "first", LARGE, 0.0)
    # 30 steps of 0.116 s: one is left.
    assert not leases(arrive(policy, "second", SMALL, 3.4))


def test_a_short_video_has_a_long_one_parked_when_every_gpu_has_one_of_its_own() -> None:
    policy = cluster(Elastic(), 1)
    arrive(policy, "long", LARGE, 0.0)
    (park,) = arrive(policy, "short", SMALL, 1.0)[-1:]
    assert isinstance(park, decide.ParkJob) and park.job_id == "long" and "short" in park.reason
    grants = policy.handle(event.JobParked("long", park.epoch, 2), 1.3)
    assert leases(grants) == {"short": (0,)}
    (again,) = [one for one in finish(policy, "short", 4.5) if isinstance(one, decide.GrantLease)]
    assert (again.job_id, again.from_step) == ("long", 2)


def test_a_shorter_video_overtakes_a_longer_one_only_if_it_comes_soon_after() -> None:
    policy = cluster(Elastic(), 1)
    arrive(policy, "running", SMALL, 0.0)
    arrive(policy, "large", LARGE, 0.0)
    arrive(policy, "soon", SMALL, 2.0)
    arrive(policy, "late", SMALL, 6.0)
    assert policy.queue_places() == {"soon": 1, "large": 2, "late": 3}


def test_the_more_backlog_there_is_the_more_the_remaining_work_counts() -> None:
    policy = cluster(Elastic(), 2)
    for number in range(60):
        arrive(policy, f"video-{number}", LARGE, 0.01 * number)
    assert policy._weight_of["video-0"] == LEAST_WEIGHT
    weights = [policy._weight_of[f"video-{number}"] for number in range(60)]
    assert weights == sorted(weights) and weights[-1] == MOST_WEIGHT


def test_a_deadline_counts_where_it_is_more_urgent() -> None:
    policy = cluster(Elastic(), 1)
    arrive(policy, "running", SMALL, 0.0)
    arrive(policy, "usual", SMALL, 0.1)
    arrive(policy, "urgent", LARGE, 0.2, deadline_s=19.4)
    arrive(policy, "far", MIDDLE, 0.3, deadline_s=1000.0)
    assert policy.queue_places() == {"urgent": 1, "usual": 2, "far": 3}


def test_a_higher_priority_takes_gpus_and_a_lower_one_never_does() -> None:
    policy = cluster(Elastic(), 1)
    arrive(policy, "important", LARGE, 0.0, priority=1)
    assert not [one for one in arrive(policy, "short", SMALL, 0.5) if isinstance(one, decide.ParkJob)]
    decisions = arrive(policy, "urgent", LARGE, 0.6, priority=2)
    assert [one.job_id for one in decisions if isinstance(one, decide.ParkJob)] == ["important"]


def test_past_saturation_every_video_has_one_gpu() -> None:
    policy = cluster(Elastic(), 8)
    for number in range(200):
        arrive(policy, f"video-{number}", LARGE, 0.0)
    at_s = 0.1
    for _ in range(20):  # every shrink takes effect
        for job in list(policy.state.jobs.values()):
            if job.phase is Phase.DENOISING and not job.settled:
                at_s += 0.01
                boundary(policy, job.job_id, job.step + 1, at_s)
    running = [job for job in policy.state.jobs.values() if job.phase is Phase.DENOISING]
    assert [len(job.slots) for job in running] == [1] * 8


def test_two_gpus_are_worth_it_while_few_wait() -> None:
    policy = cluster(Elastic(), 8)
    assert policy._degree(policy.state.jobs[_only(policy)].kind, 0.0) == 8
    kind = policy.state.jobs[_only(policy)].kind
    prices = [0.2, 0.5, 4.5, 6.0]
    assert [policy._degree(kind, price) for price in prices] == [8, 4, 2, 1]


def _only(policy: Elastic) -> str:
    if not policy.state.jobs:
        arrive(policy, "large", LARGE, 0.0)
    return next(iter(policy.state.jobs))


def test_the_arrival_rate_fades_and_is_not_fooled_by_a_short_past() -> None:
    rate = ArrivalRate(memory_s=100.0)
    assert rate.per_second(0.0) == (0.0, 0.0)
    for at_s in range(1000):
        rate.arrived(3.0, float(at_s))
    videos, work = rate.per_second(1000.0)
    assert videos == pytest.approx(1.0, rel=0.02) and work == pytest.approx(3.0, rel=0.02)
    assert rate.per_second(1100.0)[0] == pytest.approx(videos / math.e, rel=0.01)
    young = ArrivalRate(memory_s=100.0)
    for at_s in range(30):
        young.arrived(3.0, float(at_s))
    assert young.per_second(30.0)[0] == pytest.approx(1.0, rel=0.1)


def test_the_books_of_work_and_slots_to_come_return_to_nothing() -> None:
    policy = cluster(Elastic(), 4)
    for number, size in enumerate((LARGE, SMALL, MIDDLE, LARGE, SMALL, SMALL, LARGE)):
        arrive(policy, f"video-{number}", size, 0.2 * number)
    policy.handle(event.JobCancelled("video-3"), 2.0)
    at_s = 2.0
    for _ in range(200):
        at_s += 0.5
        for job in list(policy.state.jobs.values()):
            if job.phase is Phase.ENCODING:
                policy.handle(event.PromptEncoded(job.job_id, job.attempt), at_s)
            elif job.parking:
                policy.handle(event.JobParked(job.job_id, job.epoch, job.step), at_s)
            elif job.phase is Phase.DENOISING and not job.settled:
                boundary(policy, job.job_id, job.step + 1, at_s)
            elif job.phase is Phase.DENOISING:
                finish(policy, job.job_id, at_s)
    assert not policy.state.jobs
    assert policy._slots_to_come == 0 and not policy._to_come
    assert policy._waiting_work == pytest.approx(0.0, abs=1e-6)
    assert policy._running_work == pytest.approx(0.0, abs=1e-6)
    assert policy.state.placement.free_count == 4
    assert not policy._weight_of and not policy._work_of
    assert not policy._last and not any(policy._wide.values()) and not any(policy._on_server.values())
