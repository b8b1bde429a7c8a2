"""Step checkpoints with real processes: whoever is killed, the video goes on from the last one, to the same bits."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from common.bus.errors import DeadlineExceeded
from common.bus.nats_bus import NatsBus
from common.messages.cache import StoreTensor, TensorStored
from common.messages.subjects import CHECKPOINT_STORED, STORE_TENSOR
from common.messages.video import Checkpoint, CheckpointStored, Lease, VideoRequest
from common.tensors.ucx import UcxTensors
from services.dit.checkpoints import CATCH_UP_S, KEEP_PAUSE_S, CheckpointWriter, Snapshot
from services.scheduler.checkpoints import Checkpoints
from tests.support.bus import eventually
from tests.support.denoising import DenoisingStage, denoising_stage
from tests.support.nats_server import NatsServer
from tests.support.processes import WAIT_S
from tests.support.small_model import save_small_model

STEPS = 20
KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "4"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


def request(**changes: object) -> VideoRequest:
    values = {
        "model": "small",
        "prompt": "",
        "width": 128,
        "height": 128,
        "frames": 13,
        "fps": 8,
        "steps": STEPS,
        "guidance_scale": 2.0,
        "seed": 7,
    }
    return VideoRequest.model_validate(values | changes)


async def undisturbed(stage: DenoisingStage, instance: str) -> torch.Tensor:
    lease = await stage.grant(instance, request(), "undisturbed")
    latent = await stage.finished(lease)
    assert await stage.all_steps(lease) == list(range(1, STEPS + 1))
    return latent


async def test_a_killed_worker_costs_at_most_k_steps_and_not_one_bit(model: Path, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    async with denoising_stage(model, tmp_path) as stage:
        await stage.start("cache_store-0")
        every = {"dit-0": 1, "dit-1": 4}
        for instance, steps in every.items():
            await stage.start(instance, TRIPTYCH_CHECKPOINT_STEPS=str(steps))
        await stage.ready("cache_store-0", *every)
        expected = await undisturbed(stage, "dit-1")
        # A cache store that does not answer at once is asked again.
        checkpoints = Checkpoints(stage.bus, lambda: True)
        kept_up = 0
        for run in range(KILLS):
            victim, heir = ("dit-0", "dit-1") if run % 2 == 0 else ("dit-1", "dit-0")
            await stage.ready(victim, heir)
            job_id = f"video_{run}"
            lost = await stage.grant(victim, request(), job_id)
            last_step = chance.randrange(1, STEPS)
            await stage.until(lambda lost=lost, last=last_step: last in stage.steps[lost.epoch])  # type: ignore[misc]
            await asyncio.sleep(chance.random() * 0.02)
            await stage.kill(victim)
            prompt = not trouble(stage, victim)
            resume = await checkpoints.newest(job_id)
            done = stage.steps[lost.epoch][-1]
            resumed_at = resume.step if resume is not None else 0
            lease = await stage.grant(heir, request(), job_id, resume)
            stage.log(victim).unlink()
            await stage.start(victim, TRIPTYCH_CHECKPOINT_STEPS=str(every[victim]))
            latent = await stage.finished(lease)
            again = done - resumed_at
            taken = await stage.all_steps(lease, resumed_at)
            assert taken == list(range(resumed_at + 1, STEPS + 1)), "it goes on where it was"
            # A worker does not wait long for a cache store to which this machine gives no time, and says so.
            assert again <= every[victim] or not prompt, f"killed after step {done}, gone on after {resumed_at}"
            assert torch.equal(latent, expected), f"killed after step {done}, gone on after {resumed_at}"
            # The final latent is kept too, whatever the interval; trouble with that is not reported, but logged.
            await eventually(
                lambda job_id=job_id, heir=heir: STEPS in stage.stored[job_id] or trouble(stage, heir),  # type: ignore[misc]
                WAIT_S,
            )
            final = await checkpoints.newest(job_id)
            if final is not None and final.step == STEPS:
                kept_up += prompt
                assert torch.equal(await stage.tensors.fetch(final.latent, deadline_s=WAIT_S), expected)
            else:
                assert trouble(stage, heir)
        assert kept_up > 0
        # A latent that is final already only has to be handed over: what the VAE lost is not denoised again.
        final = Checkpoint(step=STEPS, latent=stage.tensors.export(expected))
        lease = await stage.grant(heir, request(), "video_0", final)
        assert torch.equal(await stage.finished(lease), expected)
        assert stage.steps[lease.epoch] == []
        assert stage.failures == []


def trouble(stage: DenoisingStage, instance: str) -> int:
    """How often the present life of a worker has said that it could not, or not soon enough, keep a checkpoint."""
    said = stage.log(instance).read_text()
    return said.count("checkpoint not stored") + said.count("the cache store is slow")


async def kept_in_part(stage: DenoisingStage, instance: str, name: str) -> Lease:
    """A job under way of which some checkpoints are stored. A slow cache store may have too few when one is done."""
    for number in range(10):
        lease = await stage.grant(instance, request(), f"{name}-{number}")
        await stage.until(lambda lease=lease: len(stage.stored[lease.job_id]) > 2 or stage.done(lease))  # type: ignore[misc]
        if not stage.done(lease):
            return lease
        await stage.finished(lease)
    raise AssertionError("this machine stands still too often")


async def test_no_cache_store_nor_its_end_nor_its_silence_costs_a_job(model: Path, tmp_path: Path) -> None:
    async with denoising_stage(model, tmp_path) as stage:
        await stage.start("dit-0", TRIPTYCH_CHECKPOINT_STEPS="1")
        await stage.ready("dit-0")
        expected = await undisturbed(stage, "dit-0")
        assert trouble(stage, "dit-0") == 1, "once, and not at every step"
        assert await stage.checkpoints.newest("undisturbed") is None

        await stage.start("cache_store-0")
        await stage.ready("cache_store-0")
        lease = await kept_in_part(stage, "dit-0", "killed")
        await stage.kill("cache_store-0")
        assert torch.equal(await stage.finished(lease), expected)

        await stage.start("cache_store-0")
        await stage.ready("cache_store-0")
        survived = await stage.checkpoints.newest(lease.job_id)
        assert survived is not None and survived.step >= stage.stored[lease.job_id][-1]
        lease = await kept_in_part(stage, "dit-0", "silent")
        stage.signal("cache_store-0", signal.SIGSTOP)
        assert torch.equal(await stage.finished(lease), expected)
        # One step waits for it, two seconds at most; this machine may stand still in another.
        assert stage.median_pause_s(lease) < CATCH_UP_S, "steps have waited for the cache store"
        stage.signal("cache_store-0", signal.SIGCONT)
        assert stage.failures == []
        stage.signal("dit-0", signal.SIGTERM)
        assert await stage.ended("dit-0") == 0


async def test_a_checkpoint_that_does_not_come_or_fit_means_the_beginning(model: Path, tmp_path: Path) -> None:
    async with denoising_stage(model, tmp_path) as stage:
        await stage.start("dit-0")
        await stage.ready("dit-0")
        expected = await undisturbed(stage, "dit-0")
        released = stage.tensors.export(torch.zeros(1, 4, 4, 16, 16))
        await stage.tensors.release(released)
        for latent in (released, stage.tensors.export(torch.zeros(1, 4, 1, 2, 2))):
            lease = await stage.grant("dit-0", request(), "video", Checkpoint(step=3, latent=latent))
            assert torch.equal(await stage.finished(lease), expected)
            assert await stage.all_steps(lease) == list(range(1, STEPS + 1))
        beyond = Checkpoint(step=STEPS + 1, latent=stage.tensors.export(torch.zeros(1)))
        assert torch.equal(await stage.finished(await stage.grant("dit-0", request(), "video", beyond)), expected)
        assert stage.log("dit-0").read_text().count("checkpoint not fetched, beginning again") == 3
        assert stage.failures == []


async def test_one_store_at_a_time_and_the_newest_wins(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.dit.checkpoints.STORE_DEADLINE_S", WAIT_S)
    monkeypatch.setattr("services.dit.checkpoints.FIRST_STORE_DEADLINE_S", WAIT_S)
    asked: list[StoreTensor] = []
    first, go_on = asyncio.Event(), asyncio.Event()

    async def keep(ask: StoreTensor) -> TensorStored:
        # Who waits long asks once more.
        if not asked or asked[-1].tensor_version != ask.tensor_version:
            asked.append(ask)
        first.set()
        await asyncio.wait_for(go_on.wait(), WAIT_S)
        return TensorStored(key=ask.key, tensor_version=ask.tensor_version, stored=True)

    told: list[CheckpointStored] = []
    async with (
        await NatsBus.connect(nats_server.url, name="dit-0") as bus,
        await UcxTensors.open(owner="dit-0") as tensors,
    ):
        await bus.serve(STORE_TENSOR, keep)
        await bus.subscribe(CHECKPOINT_STORED, told.append)
        writer = CheckpointWriter(bus, tensors)
        running = asyncio.create_task(writer.run())
        for job_id, steps in (("a", 20), ("b", 20), ("c", 30)):
            for step in range(1, steps + 1):
                writer.offer(Snapshot(job_id, 1, step, torch.full((4,), float(step))))
                await asyncio.wait_for(first.wait(), WAIT_S)
        assert [(ask.key, ask.tensor_version) for ask in asked] == [("video/a/latent", 1)]
        go_on.set()
        await asyncio.wait_for(writer.idle.wait(), WAIT_S)
        # Of the jobs that waited, the last two, each with its newest.
        assert [(ask.key, ask.tensor_version) for ask in asked[1:]] == [("video/b/latent", 20), ("video/c/latent", 30)]
        assert tensors.exported_count == 0
        await bus.request(STORE_TENSOR, asked[0].model_copy(update={"tensor_version": 99}), deadline_s=WAIT_S)
        assert [(each.job_id, each.step) for each in told] == [("a", 1), ("b", 20), ("c", 30)]
        running.cancel()


async def test_a_store_that_does_not_answer_is_not_asked_without_a_pause(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wait, seconds in (("STORE_DEADLINE_S", 0.01), ("FIRST_STORE_DEADLINE_S", 0.01), ("KEEP_WITHIN_S", 1.0)):
        monkeypatch.setattr(f"services.dit.checkpoints.{wait}", seconds)
    asked: list[StoreTensor] = []
    never = asyncio.Event()

    async def keep(ask: StoreTensor) -> TensorStored:
        asked.append(ask)
        await never.wait()
        raise AssertionError

    async with (
        await NatsBus.connect(nats_server.url, name="dit-0") as bus,
        await UcxTensors.open(owner="dit-0") as tensors,
    ):
        serving = await bus.serve(STORE_TENSOR, keep)
        with pytest.raises(DeadlineExceeded):
            await CheckpointWriter(bus, tensors).keep(Snapshot("a", 1, 1, torch.zeros(4)))
        await serving.stop(deadline_s=0.0)
        assert tensors.exported_count == 0
    # Twice each time, and once more when the time is over.
    assert len(asked) <= 2 * (1 + 1.0 / KEEP_PAUSE_S)
