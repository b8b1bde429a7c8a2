"""Elastic: what defines it, on hand-written sequences. Times by the paper's table; steps end when a test says so."""

import math

import pytest

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.demand import ArrivalRate, ReferenceTail
from common.policies.video.elastic import DUE_PART, LATE_SHARE, PATIENCE, WINDOW, Elastic
from common.policies.video.state import Phase
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


def look(policy: Elastic, at_s: float) -> list[decide.Decision]:
    """Nothing happens that matters, but the policy looks at the clock, and prompts are encoded."""
    decisions = policy.handle(event.WorkerJoined("encoder-1", Service.ENCODER), at_s)
    for job in list(policy.state.by_phase[Phase.ENCODING].values()):
        decisions += policy.handle(event.PromptEncoded(job.job_id, job.attempt), at_s)
    return decisions


def due_after(policy: Elastic, seconds: float, may_be_late: float = 0.0) -> None:
    """As after many videos that give each that comes so many seconds; ``may_be_late`` of them may take longer."""
    policy._tail = ReferenceTail(LATE_SHARE, WINDOW)
    for _ in range(WINDOW):
        policy._tail.arrived(0.0, seconds / DUE_PART, 1, 0.0)
    policy._may_be_late = may_be_late


def behind_an_important_one(*videos: tuple[str, tuple[int, int], float]) -> Elastic:
    """The only GPU has a large video that nothing is taken from; these wait: id, size, arrival."""
    policy = cluster(Elastic(), 1)
    due_after(policy, 100.0)
    arrive(policy, "running", LARGE, 0.0, priority=9)
    for job_id, size, at_s in videos:
        arrive(policy, job_id, size, at_s)
    return policy


def test_the_shortest_comes_first_while_nobody_gets_late_by_it() -> None:
    policy = behind_an_important_one(("large", LARGE, 0.1), ("middle", MIDDLE, 0.1), ("small", SMALL, 0.1))
    assert policy.queue_places() == {"small": 1, "middle": 2, "large": 3}


def test_at_its_latest_start_a_video_goes_before_shorter_ones() -> None:
    policy = behind_an_important_one(("large", LARGE, 0.1), ("small", SMALL, 0.1))
    latest_s = 0.1 + 100.0 - 19.32  # 30 steps of 0.615 s on one GPU, and the decoding
    look(policy, latest_s - 0.01)
    assert policy.queue_places() == {"small": 1, "large": 2}
    look(policy, latest_s + 0.01)
    assert policy.queue_places() == {"large": 1, "small": 2}


def test_a_video_is_pressing_the_sooner_the_more_there_is_to_do_before_it() -> None:
    videos = ("next", LARGE, 5.0), ("small", SMALL, 5.0)
    latest_s = 0.1 + 100.0 - 19.32
    policy = behind_an_important_one(*videos)
    look(policy, latest_s + 0.01)
    assert not policy._pressing
    policy = behind_an_important_one(("large", LARGE, 0.1), *videos)
    look(policy, latest_s + 0.01)
    assert set(policy._pressing) >= {"large", "next"}, "the one starts in time only if it is next but one"


def test_pressing_videos_go_by_their_latest_start_so_that_long_ones_start_sooner() -> None:
    policy = behind_an_important_one(("small", SMALL, 0.1), ("large", LARGE, 5.0))
    look(policy, 200.0)
    assert policy.queue_places() == {"large": 1, "small": 2}


def test_no_video_starves_however_many_shorter_ones_come() -> None:
    policy = cluster(Elastic(), 1)
    due_after(policy, 60.0)
    arrive(policy, "small-0", SMALL, 0.0)
    arrive(policy, "large", LARGE, 0.1)
    at_s, number = 3.0, 1
    while policy.state.jobs["large"].phase is not Phase.DENOISING:
        arrive(policy, f"small-{number}", SMALL, at_s - 1.0)
        finish(policy, f"small-{number - 1}", at_s)
        at_s, number = at_s + 3.0, number + 1
        assert at_s < 0.1 + 60.0
    assert number > 10, "many went first"


def test_one_long_video_in_a_hundred_is_passed_over_but_not_for_ever() -> None:
    policy = behind_an_important_one(("small", SMALL, 0.1), ("large", LARGE, 0.2), ("second", LARGE, 0.3))
    due_after(policy, 100.0, may_be_late=1.0)
    look(policy, 200.0)
    assert policy.queue_places() == {"second": 1, "small": 2, "large": 3}
    look(policy, 0.2 + PATIENCE * 100.0)
    arrive(policy, "new", SMALL, 0.2 + PATIENCE * 100.0)
    look(policy, 0.3 + PATIENCE * 100.0)
    assert policy.queue_places() == {"second": 1, "small": 2, "large": 3, "new": 4}


def test_the_one_in_a_hundred_is_one_of_the_longest_and_none_of_the_first_hundred() -> None:
    policy = cluster(Elastic(), 1)
    for number in range(99):
        assert policy._may_be_late < 1.0
        arrive(policy, f"video-{number}", LARGE if number % 10 == 0 else SMALL, 0.0)
    arrive(policy, "middle", MIDDLE, 0.0)
    assert policy._may_be_late == pytest.approx(1.0)
    policy._may_be_late = 1.0
    assert not policy._pass_over(policy.state.jobs["middle"])
    assert policy._pass_over(policy.state.jobs["video-90"])


def test_a_deadline_counts_in_place_of_the_reference_and_is_never_passed_over() -> None:
    policy = behind_an_important_one(("usual", LARGE, 0.1), ("small", SMALL, 0.2))
    arrive(policy, "urgent", LARGE, 0.3, deadline_s=25.0)
    due_after(policy, 100.0, may_be_late=1.0)
    look(policy, 6.0)
    assert policy.queue_places() == {"urgent": 1, "small": 2, "usual": 3}


def test_a_pressing_video_has_a_running_one_parked_and_one_that_is_not_does_not() -> None:
    policy = cluster(Elastic(), 1)
    due_after(policy, 30.0)
    arrive(policy, "running", MIDDLE, 0.0)
    assert not [one for one in arrive(policy, "large", LARGE, 0.1) if isinstance(one, decide.ParkJob)]
    due_after(policy, 21.0)
    (park,) = [one for one in look(policy, 2.0) if isinstance(one, decide.ParkJob)]
    assert park.job_id == "running", "which has been served for 2 s of 7.89"


def test_nothing_is_taken_from_a_video_that_would_be_late_by_it() -> None:
    policy = with_a_late_one()
    arrive(policy, "short", SMALL, 3.1)
    assert policy.state.jobs["late"].settled, "though it has most work left, by far"


def with_a_late_one() -> Elastic:
    """Four GPUs: a late large video on one, and three small ones that are in time; one more waits."""
    policy = cluster(Elastic(), 4)
    for number in range(4):
        arrive(policy, f"important-{number}", SMALL, 0.0, priority=9)
    for number in (1, 2, 3):
        arrive(policy, f"small-{number}", SMALL, 0.1)
        finish(policy, f"important-{number}", 3.0)
    arrive(policy, "late", LARGE, 3.0)
    finish(policy, "important-0", 3.0)
    due_after(policy, 8.0)
    arrive(policy, "waiting", SMALL, 3.0)
    assert [len(job.lease) for job in policy.state.by_phase[Phase.DENOISING].values()] == [1, 1, 1, 1]
    return policy


def test_freed_gpus_go_to_a_late_video_before_a_waiting_one() -> None:
    policy = with_a_late_one()
    assert [(job_id, len(slots)) for job_id, slots in leases(finish(policy, "small-1", 5.0)).items()] == [("late", 2)]


def test_room_is_made_for_a_late_video_by_those_that_are_in_time() -> None:
    policy = with_a_late_one()
    finish(policy, "small-1", 4.0)
    boundary(policy, "late", 2, 4.23)
    decisions = finish(policy, "small-2", 4.3)
    (park,) = [one for one in decisions if isinstance(one, decide.ParkJob)]
    assert park.job_id == "small-3", "one GPU is free and two are needed"
    assert not leases(decisions), "the free one is kept"
    grants = leases(policy.handle(event.JobParked("small-3", park.epoch, 14), 4.4))
    assert len(grants["late"]) == 4


def test_room_is_made_for_a_late_video_when_nobody_waits_too() -> None:
    policy = cluster(Elastic(), 8)
    due_after(policy, 100.0)
    arrive(policy, "first", LARGE, 0.0)
    arrive(policy, "late", LARGE, 0.5)
    boundary(policy, "first", 5, 0.6)
    arrive(policy, "small", SMALL, 0.7)
    boundary(policy, "late", 1, 0.8)
    assert {job_id: len(job.lease) for job_id, job in policy.state.jobs.items()} == {"first": 4, "late": 2, "small": 1}
    due_after(policy, 10.0)
    policy.state.placement.freed_servers = 1
    halved = leases(look(policy, 0.9))
    assert {job_id: len(slots) for job_id, slots in halved.items()} == {"first": 2}, "one is free, and two are needed"


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
    assert rate.long_work_s == pytest.approx(3.0)
    for at_s in range(1000, 2000):
        rate.arrived(9.0 if at_s % 4 == 0 else 1.0, float(at_s))
    assert rate.long_work_s == pytest.approx((81 + 3) / (9 + 3), rel=0.05)
    young = ArrivalRate(memory_s=100.0)
    for at_s in range(30):
        young.arrived(3.0, float(at_s))
    assert young.per_second(30.0)[0] == pytest.approx(1.0, rel=0.1)


def test_the_reference_is_a_single_queue_and_forgets() -> None:
    tail = ReferenceTail(share=0.01, window=3)
    for at_s in (0.0, 0.0, 10.0):
        tail.arrived(work_s=8.0, own_s=3.0, gpus=4, now_s=at_s)
    assert tail.seconds == 5.0, "the second of two at once finds 8 GPU-seconds of work on 4 GPUs"
    for at_s in (20.0, 30.0):
        tail.arrived(work_s=8.0, own_s=3.0, gpus=4, now_s=at_s)
    assert tail.seconds == 3.0


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
    assert policy._pressing_work == pytest.approx(0.0, abs=1e-6)
    assert policy.state.placement.free_count == 4
    assert not policy._work_of and not policy._pressing and not policy._passed_over
    assert not policy._last and not any(policy._wide.values()) and not any(policy._on_server.values())
