"""DiT workers as real processes that share videos: whoever comes, goes, parks or dies, the latent is one worker's own.

Real NATS, UCX and Gloo, four workers and a cache store; the test is their scheduler.
"""

import asyncio
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from common.messages.video import Lease, VideoRequest
from tests.support.denoising import PATIENT, DenoisingStage, Outrun, denoising_stage, unless_outrun
from tests.support.small_model import save_small_model

STEPS = 40
ATOL = 1e-4
KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "4"))
WORKERS = ("dit-0", "dit-1", "dit-2", "dit-3")
REQUEST = VideoRequest(
    model="small", prompt="", width=96, height=96, frames=13, fps=8, steps=STEPS, guidance_scale=2.0, seed=7
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


async def everybody(stage: DenoisingStage) -> None:
    await stage.start("cache_store-0")
    for instance in WORKERS:
        await stage.start(instance, **PATIENT)
    await stage.ready("cache_store-0", *WORKERS)


async def alone(stage: DenoisingStage) -> torch.Tensor:
    """What one worker makes of the request, undisturbed."""
    lease = await stage.grant("dit-0", REQUEST, "alone")
    latent = await stage.finished(lease)
    assert await stage.all_steps(lease) == list(range(1, STEPS + 1))
    return latent


async def some_steps(stage: DenoisingStage, lease: Lease, count: int = 3) -> None:
    """Return once so many steps have run under the lease.

    Raises:
        Outrun: the job was done before, or just then.
    """
    await stage.until(lambda: len(stage.steps[lease.epoch]) >= count or bool(stage.failures))
    await not_done(stage, lease)


async def not_done(stage: DenoisingStage, lease: Lease) -> None:
    """Raises Outrun where the job is done."""
    if stage.done(lease) or stage.failures:
        await stage.finished(lease)
        raise Outrun


def same(latent: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(latent, expected, atol=ATOL, rtol=0.0)


async def test_members_come_and_go_and_jobs_are_parked_and_taken_away(model: Path, tmp_path: Path) -> None:
    async with denoising_stage(model, tmp_path) as stage:
        await everybody(stage)
        expected = await alone(stage)
        for play in (
            lambda: grows_and_shrinks(stage, expected),
            lambda: is_parked_and_resumed(stage, expected, ("dit-2",), ("dit-3",)),
            lambda: is_parked_and_resumed(stage, expected, ("dit-1", "dit-3"), WORKERS),
            lambda: is_taken_away(stage, expected),
            lambda: is_taken_back_and_granted_again(stage, expected),
            lambda: is_taken_back_and_goes_on_elsewhere(stage, expected, ("dit-0", "dit-1"), ("dit-2", "dit-1")),
            lambda: is_taken_back_and_goes_on_elsewhere(stage, expected, ("dit-3",), ("dit-0",)),
        ):
            await unless_outrun(play)
        assert stage.failures == [] and stage.lost == []


async def grows_and_shrinks(stage: DenoisingStage, expected: torch.Tensor) -> None:
    """1 -> 2 -> 4 -> 2 other members -> 1, each step done once and reported with the slots it ran on."""
    job_id = f"changing-{len(stage.reports)}"
    leases = [await stage.start_job(("dit-0",), REQUEST, job_id)]
    groups = [("dit-0", "dit-1"), WORKERS, ("dit-0", "dit-3"), ("dit-0",)]
    for members in groups:
        await some_steps(stage, leases[-1])
        leases.append(await stage.change(leases[-1], *members))
    latent = await stage.finished(leases[-1])
    reports = stage.of_job(job_id)
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert all(report.instance == "dit-0" for report in reports)
    slots = {lease.epoch: lease.slots for lease in leases}
    assert all(report.slots == slots[report.epoch] for report in reports)
    changed = [(report.epoch, report.next_epoch) for report in reports if report.next_epoch is not None]
    epochs = [lease.epoch for lease in leases]
    assert changed == list(itertools.pairwise(epochs)), "told in the report of the last step before"
    same(latent, expected)


async def is_parked_and_resumed(
    stage: DenoisingStage, expected: torch.Tensor, first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    job_id = f"parked-{len(stage.reports)}"
    lease = await stage.start_job(first, REQUEST, job_id)
    await some_steps(stage, lease)
    parked = await stage.park(lease)
    if parked is None:
        raise Outrun
    assert (parked.epoch, parked.instance) == (lease.epoch, first[0])
    assert stage.steps[lease.epoch] == list(range(1, parked.step + 1))
    resume = await stage.checkpoints.newest(job_id)
    assert resume is not None and resume.step == parked.step
    again = await stage.start_job(then, REQUEST, job_id, resume)
    latent = await stage.finished(again)
    assert await stage.all_steps(again, parked.step) == list(range(parked.step + 1, STEPS + 1)), "no step is done again"
    same(latent, expected)
    if len(first) == len(then) == 1:
        assert torch.equal(latent, expected)


async def is_taken_away(stage: DenoisingStage, expected: torch.Tensor) -> None:
    """Revoked in a step, by all members at different times; all are free for the next at once."""
    lease = await stage.start_job(WORKERS, REQUEST.model_copy(update={"steps": 5000}), "revoked")
    await some_steps(stage, lease)
    await stage.revoke(lease)
    heard = len(stage.steps[lease.epoch])
    following = await stage.start_job(("dit-3", "dit-1", "dit-0", "dit-2"), REQUEST, "following")
    latent = await stage.finished(following)
    # The step under way when the leader heard of it, and one whose report crossed the revocation.
    assert len(stage.steps[lease.epoch]) <= heard + 2
    same(latent, expected)


async def is_taken_back_and_granted_again(stage: DenoisingStage, expected: torch.Tensor) -> None:
    """As a scheduler does that starts anew; its leader still has the latent, and no checkpoint is needed."""
    job_id = f"taken-back-{len(stage.reports)}"
    lease = await stage.start_job(("dit-0", "dit-1"), REQUEST, job_id)
    await some_steps(stage, lease)
    for instance in WORKERS:
        await stage.workers.take_back(instance, lease.epoch)
    if stage.done(lease):
        raise Outrun
    again = await stage.start_job(("dit-0", "dit-2"), REQUEST, job_id)
    latent = await stage.finished(again)
    done = stage.steps[lease.epoch][-1]
    assert await stage.all_steps(again, done) == list(range(done + 1, STEPS + 1)), "no step is done again"
    same(latent, expected)


async def is_taken_back_and_goes_on_elsewhere(
    stage: DenoisingStage, expected: torch.Tensor, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """As a scheduler does that starts anew, with others to lead; what was there before says what it kept."""
    job_id = f"elsewhere-{len(stage.reports)}"
    lease = await stage.start_job(before, REQUEST, job_id)
    await some_steps(stage, lease)
    assert await stage.workers.kept_latent(job_id, 0, after[0]) is None, "what was not taken back is not given away"
    for instance in WORKERS:
        await stage.workers.take_back(instance, lease.epoch)
    if stage.done(lease):
        raise Outrun
    kept = await stage.workers.kept_latent(job_id, 0, after[0])
    assert kept is not None
    again = await stage.start_job(after, REQUEST, job_id, kept)
    latent = await stage.finished(again)
    assert kept.step == stage.steps[lease.epoch][-1]
    assert await stage.all_steps(again, kept.step) == list(range(kept.step + 1, STEPS + 1)), "no step is done again"
    same(latent, expected)
    if len(before) == len(after) == 1:
        assert torch.equal(latent, expected)


async def test_whoever_is_killed_costs_one_step_at_most(model: Path, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    async with denoising_stage(model, tmp_path) as stage:
        await everybody(stage)
        expected = await alone(stage)
        for run in range(KILLS):
            members = WORKERS if run % 2 == 0 else WORKERS[:2]
            # The leader, then a follower, of either size.
            victim = members[0] if run // 2 % 2 == 0 else chance.choice(members[1:])
            await unless_outrun(
                lambda members=members, victim=victim: is_killed(stage, expected, members, victim, chance)
            )
        await unless_outrun(lambda: hangs(stage, expected))
        assert stage.failures == []
        await unless_outrun(lambda: nobody_grants(stage, expected))


async def is_killed(
    stage: DenoisingStage, expected: torch.Tensor, members: tuple[str, ...], victim: str, chance: random.Random
) -> None:
    await stage.ready(*members)
    job_id = f"killed-{len(stage.reports)}"
    lease = await stage.start_job(members, REQUEST, job_id)
    last_step = chance.randrange(1, STEPS - 5)
    await stage.until(lambda: last_step in stage.steps[lease.epoch])
    await asyncio.sleep(chance.random() * 0.02)
    await stage.kill(victim)
    left = tuple(instance for instance in members if instance != victim)
    await stage.until(
        lambda: {report.instance for report in stage.lost if report.job_id == job_id} >= set(left) or stage.done(lease)
    )
    if stage.done(lease):
        await stage.start(victim, **PATIENT)
        raise Outrun
    done = stage.steps[lease.epoch][-1]
    # As the policy does: the largest power of two of those who are left.
    healing = await stage.change(lease, *left[: 2 if len(left) > 1 else 1])
    await stage.start(victim, **PATIENT)
    latent = await stage.finished(healing)
    said = f"{victim} of {len(members)} killed after step {done}"
    first = stage.steps[healing.epoch][0]
    # A leader may die with a step that all have done and that it has not reported.
    assert done <= first <= done + 1 + (victim == members[0]), f"{said}, gone on with step {first}"
    assert stage.steps[healing.epoch] == list(range(first, STEPS + 1)), said
    same(latent, expected)


async def hangs(stage: DenoisingStage, expected: torch.Tensor) -> None:
    """A member that stands still breaks the group after a while; when it wakes up it is told so, and of use again."""
    await is_impatient(stage, "dit-0", TRIPTYCH_EXCHANGE_TIMEOUT_S="3")
    await stage.ready(*WORKERS)
    lease = await stage.start_job(("dit-0", "dit-1"), REQUEST, f"hanging-{len(stage.reports)}")
    await some_steps(stage, lease)
    stage.signal("dit-1", signal.SIGSTOP)
    try:
        # The scheduler misses its life signs before the group misses its part of the step.
        healing = await stage.change(lease, "dit-0")
        same(await stage.finished(healing), expected)
    finally:
        stage.signal("dit-1", signal.SIGCONT)
    # With one that is patient: what has woken up may stand still once more.
    following = await stage.start_job(("dit-1", "dit-2"), REQUEST, "after-hanging")
    same(await stage.finished(following), expected)


async def is_impatient(stage: DenoisingStage, instance: str, **settings: str) -> None:
    """Give a worker a new life with these settings."""
    await stage.kill(instance)
    await stage.start(instance, **(PATIENT | settings))


async def nobody_grants(stage: DenoisingStage, expected: torch.Tensor) -> None:
    """Without a lease for those who are left the leader gives up, and the job goes on from its checkpoint."""
    await is_impatient(stage, "dit-0", TRIPTYCH_REGROUP_S="1")
    await stage.ready(*WORKERS)
    job_id = f"given-up-{len(stage.reports)}"
    lease = await stage.start_job(("dit-0", "dit-1"), REQUEST, job_id)
    await stage.until(lambda: bool(stage.stored[job_id]))
    await stage.kill("dit-1")
    await stage.until(lambda: bool(stage.failures) or stage.done(lease))
    if not stage.failures:
        await stage.start("dit-1", **PATIENT)
        raise Outrun
    (failed,) = stage.failures
    assert (failed.instance, failed.epoch) == ("dit-0", lease.epoch)
    assert (failed.failure.code, failed.failure.retryable) == ("group_broken", True)
    # What was kept is forgotten by now: a lease that counts on it fails at once.
    late = await stage.change(lease, "dit-0")
    await stage.until(lambda: len(stage.failures) == 2)
    assert (stage.failures[1].epoch, stage.failures[1].failure.code) == (late.epoch, "latent_lost")
    resume = await stage.checkpoints.newest(job_id)
    assert resume is not None
    again = await stage.start_job(("dit-2", "dit-3"), REQUEST, job_id, resume)
    same(await stage.finished(again), expected)
    assert await stage.all_steps(again, resume.step) == list(range(resume.step + 1, STEPS + 1))
