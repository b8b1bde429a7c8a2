"""First come first served, and the life of a job that every policy shares: events in, decisions out."""

import pytest

from common.messages.cluster import Service
from common.policies.video import decisions as decide
from common.policies.video import events as event
from common.policies.video.fifo import Fifo
from common.policies.video.policy import MAX_ATTEMPTS, Policy
from common.policies.video.registry import UnknownPolicy, make_policy


def cluster(slots: int = 2) -> Fifo:
    policy = Fifo(first_epoch=100)
    policy.handle(event.WorkerJoined("encoder-0", Service.ENCODER), 0.0)
    for slot in range(slots):
        policy.handle(event.WorkerJoined(f"dit-{slot}", Service.DIT, slot), 0.0)
        policy.handle(event.WorkerJoined(f"vae-{slot}", Service.VAE, slot), 0.0)
    return policy


def arrive(policy: Policy, job_id: str, at_s: float) -> list[decide.Decision]:
    return policy.handle(event.JobArrived(job_id, at_s, 64, 64, 16, steps=2), at_s)


def kinds(decisions: list[decide.Decision]) -> list[str]:
    return [type(decision).__name__ for decision in decisions]


def start(policy: Policy, job_id: str, at_s: float = 1.0) -> decide.GrantLease:
    """Bring a job to its lease on a policy with free slots."""
    arrive(policy, job_id, at_s)
    (grant,) = policy.handle(event.PromptEncoded(job_id, 1), at_s)
    assert isinstance(grant, decide.GrantLease)
    return grant


def test_one_job_from_arrival_to_the_end() -> None:
    policy = cluster()
    assert arrive(policy, "a", 1.0) == [decide.StartEncoding("a", 1, "encoder-0", "next in the queue")]
    (grant,) = policy.handle(event.PromptEncoded("a", 1), 1.1)
    assert grant == decide.GrantLease("a", 100, ("dit-0",), (0,), "first in the queue; slot 0 is free")
    assert policy.handle(event.StepFinished("a", 100, 1), 1.2) == []
    (decode,) = policy.handle(event.DenoisingFinished("a", 100), 1.3)
    assert decode == decide.StartDecoding("a", 100, "vae-0", 0, "denoised; slot 0 has a VAE worker")
    assert policy.handle(event.DecodingFinished("a", 100), 1.4) == [decide.CompleteJob("a", "decoded")]
    assert policy.state.jobs == {}
    assert all(slot.job_id is None for slot in policy.state.slots.values())


def test_slots_go_to_the_longest_waiting_and_prompts_are_encoded_one_ahead_of_each_slot() -> None:
    policy = cluster(slots=2)
    for number, job_id in enumerate("abcd"):
        arrive(policy, job_id, float(number))
    assert [job.job_id for job in policy.state.jobs.values() if job.attempt] == ["a", "b"]
    # b's prompt is ready first, but nothing is gained by letting it wait for a: there is a slot for each.
    (grant_b, encode_c) = policy.handle(event.PromptEncoded("b", 1), 5.0)
    assert isinstance(grant_b, decide.GrantLease) and grant_b.slots == (0,)
    assert isinstance(encode_c, decide.StartEncoding) and encode_c.job_id == "c"
    (grant_a, _encode_d) = policy.handle(event.PromptEncoded("a", 1), 5.1)
    assert isinstance(grant_a, decide.GrantLease) and grant_a.slots == (1,)
    assert policy.handle(event.PromptEncoded("d", 1), 5.2) == []
    assert policy.handle(event.PromptEncoded("c", 1), 5.3) == []
    assert policy.queue_places() == {"c": 1, "d": 2}
    policy.handle(event.DenoisingFinished("b", grant_b.epoch), 6.0)
    complete, grant_c = policy.handle(event.DecodingFinished("b", grant_b.epoch), 6.5)
    assert isinstance(complete, decide.CompleteJob)
    assert isinstance(grant_c, decide.GrantLease) and (grant_c.job_id, grant_c.slots) == ("c", (0,))


def test_a_slot_is_never_given_to_dit_and_vae_at_once() -> None:
    policy = cluster(slots=1)
    grant = start(policy, "a")
    arrive(policy, "b", 2.0)
    policy.handle(event.PromptEncoded("b", 1), 2.1)
    assert kinds(policy.handle(event.DenoisingFinished("a", grant.epoch), 3.0)) == ["StartDecoding"]
    assert kinds(policy.handle(event.DecodingFinished("a", grant.epoch), 4.0)) == ["CompleteJob", "GrantLease"]


def test_a_latent_whose_slot_has_no_vae_waits_for_one_that_has_and_frees_its_slot() -> None:
    policy = Fifo()
    policy.handle(event.WorkerJoined("encoder-0", Service.ENCODER), 0.0)
    policy.handle(event.WorkerJoined("dit-0", Service.DIT, 0), 0.0)
    grant = start(policy, "a")
    arrive(policy, "b", 2.0)
    policy.handle(event.PromptEncoded("b", 1), 2.0)
    assert kinds(policy.handle(event.DenoisingFinished("a", grant.epoch), 3.0)) == ["GrantLease"]
    (decode,) = policy.handle(event.WorkerJoined("vae-1", Service.VAE, 1), 4.0)
    assert isinstance(decode, decide.StartDecoding) and (decode.instance, decode.slot) == ("vae-1", 1)


def test_a_lost_dit_worker_sends_its_job_back_to_its_old_place() -> None:
    policy = cluster(slots=2)
    grant = start(policy, "a", 1.0)
    start(policy, "b", 2.0)
    arrive(policy, "c", 3.0)
    lost = policy.handle(event.WorkerLost("dit-0"), 4.0)
    assert lost[:2] == [
        decide.RevokeLease("a", grant.epoch, ("dit-0",), "dit-0 was lost"),
        decide.RequeueJob("a", "dit-0 was lost"),
    ]
    assert lost[2:] == [decide.StartEncoding("a", 2, "encoder-0", "next in the queue")]
    policy.handle(event.PromptEncoded("c", 1), 4.5)
    assert policy.handle(event.PromptEncoded("a", 2), 5.0) == []
    assert policy.queue_places() == {"a": 1, "c": 2}
    (again, *_) = policy.handle(event.WorkerJoined("dit-0", Service.DIT, 0), 6.0)
    assert isinstance(again, decide.GrantLease) and again.job_id == "a" and again.epoch > grant.epoch


def test_a_lost_encoder_costs_those_whose_embeddings_it_still_keeps() -> None:
    policy = cluster(slots=1)
    grant = start(policy, "a", 1.0)
    policy.handle(event.StepFinished("a", grant.epoch, 1), 1.5)
    arrive(policy, "b", 2.0)
    policy.handle(event.PromptEncoded("b", 1), 2.5)
    assert policy.handle(event.WorkerLost("encoder-0"), 3.0) == [decide.RequeueJob("b", "encoder-0 was lost")]


def test_a_lost_vae_worker_cancels_nothing_else() -> None:
    policy = cluster(slots=2)
    grant = start(policy, "a", 1.0)
    start(policy, "b", 2.0)
    policy.handle(event.DenoisingFinished("a", grant.epoch), 3.0)
    assert kinds(policy.handle(event.WorkerLost("vae-0"), 4.0)) == [
        "RevokeLease",
        "CancelDecoding",
        "RequeueJob",
        "StartEncoding",
    ]
    assert policy.state.slots[1].job_id == "b"


def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    policy = cluster(slots=1)
    grant = start(policy, "a", 1.0)
    arrive(policy, "b", 2.0)
    policy.handle(event.PromptEncoded("b", 1), 2.1)
    assert policy.handle(event.WorkerDraining("dit-0"), 2.5) == []
    assert kinds(policy.handle(event.DenoisingFinished("a", grant.epoch), 3.0)) == ["StartDecoding"]
    assert kinds(policy.handle(event.DecodingFinished("a", grant.epoch), 4.0)) == ["CompleteJob"]
    assert policy.handle(event.WorkerLost("dit-0"), 5.0) == []


def test_cancelling_takes_back_everything_and_starts_the_next() -> None:
    policy = cluster(slots=1)
    grant = start(policy, "a", 1.0)
    arrive(policy, "b", 2.0)
    policy.handle(event.PromptEncoded("b", 1), 2.1)
    revoke, next_grant = policy.handle(event.JobCancelled("a"), 3.0)
    assert revoke == decide.RevokeLease("a", grant.epoch, ("dit-0",), "cancelled")
    assert isinstance(next_grant, decide.GrantLease) and next_grant.job_id == "b"
    assert policy.handle(event.JobCancelled("a"), 3.1) == []


def test_reports_of_an_overtaken_attempt_or_epoch_change_nothing() -> None:
    policy = cluster(slots=1)
    grant = start(policy, "a", 1.0)
    policy.handle(event.AttemptFailed("a", 1, "hiccup", retryable=True), 2.0)
    for stale in (
        event.PromptEncoded("a", 1),
        event.StepFinished("a", grant.epoch, 2),
        event.DenoisingFinished("a", grant.epoch),
        event.DecodingFinished("a", grant.epoch),
        event.AttemptFailed("a", 1, "late", retryable=False),
    ):
        assert policy.handle(stale, 3.0) == []
    assert policy.state.jobs["a"].attempt == 2


def test_a_failure_that_repeats_ends_the_job() -> None:
    policy = cluster(slots=1)
    arrive(policy, "a", 1.0)
    for attempt in range(1, MAX_ATTEMPTS):
        decisions = policy.handle(event.AttemptFailed("a", attempt, "boom", retryable=True), 2.0)
        assert kinds(decisions) == ["RequeueJob", "StartEncoding"]
    (end,) = policy.handle(event.AttemptFailed("a", MAX_ATTEMPTS, "boom", retryable=True), 3.0)
    assert isinstance(end, decide.FailJob) and "5 attempts without progress" in end.reason


def test_a_final_failure_ends_the_job_at_once_and_attempts_before_a_restart_count() -> None:
    policy = cluster(slots=1)
    arrive(policy, "a", 1.0)
    assert kinds(policy.handle(event.AttemptFailed("a", 1, "too long", retryable=False), 2.0)) == ["FailJob"]
    policy.handle(event.JobArrived("b", 3.0, 64, 64, 16, 2, attempt=MAX_ATTEMPTS - 1), 3.0)
    assert kinds(policy.handle(event.AttemptFailed("b", MAX_ATTEMPTS, "boom", retryable=True), 4.0)) == ["FailJob"]


def test_only_attempts_that_come_to_nothing_are_counted() -> None:
    policy = cluster(slots=1)
    policy.handle(event.JobArrived("a", 1.0, 64, 64, 16, 20, attempt=0), 1.0)
    for attempt in range(1, 2 * MAX_ATTEMPTS):
        policy.handle(event.PromptEncoded("a", attempt), 2.0)
        policy.handle(event.CheckpointStored("a", attempt), 3.0)
        assert "FailJob" not in kinds(policy.handle(event.AttemptFailed("a", attempt, "boom", retryable=True), 4.0))
    for attempt in range(2 * MAX_ATTEMPTS, 3 * MAX_ATTEMPTS):
        assert policy.state.jobs["a"].attempt == attempt
        decisions = policy.handle(event.AttemptFailed("a", attempt, "boom", retryable=True), 5.0)
    assert kinds(decisions)[-1] == "FailJob"


def test_while_draining_nothing_new_starts_and_what_runs_is_decoded() -> None:
    policy = cluster(slots=2)
    grant = start(policy, "a", 1.0)
    assert policy.handle(event.DrainRequested(), 1.5) == []
    assert arrive(policy, "b", 2.0) == []
    assert kinds(policy.handle(event.DenoisingFinished("a", grant.epoch), 3.0)) == ["StartDecoding"]


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(UnknownPolicy, match="fifo"):
        make_policy("best")
