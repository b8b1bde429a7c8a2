"""Any schedule of leases gives the latent of one worker (DDiT): members come, go, park and go on elsewhere.

Real workers, NATS, UCX and Gloo, with random schedules among degrees 1, 2 and 4; the test is their scheduler.
``TRIPTYCH_TEST_SEED`` repeats a draw, ``TRIPTYCH_TEST_KILLS`` sets how many schedules there are.
"""

import asyncio
import os
import random
import signal
from itertools import groupby
from pathlib import Path

import pytest
import torch

from common.messages.video import Lease, VideoRequest
from services.dit.checkpoints import STORE_DEADLINE_S
from tests.support.denoising import PATIENT, DenoisingStage, denoising_stage
from tests.support.small_model import save_small_model

SCHEDULES = int(os.environ.get("TRIPTYCH_TEST_KILLS", "5"))
SEED = int(os.environ["TRIPTYCH_TEST_SEED"])
STEPS = 24
ATOL = 1e-4
WORKERS = ("dit-0", "dit-1", "dit-2", "dit-3")
REQUEST = VideoRequest(
    model="small", prompt="", width=96, height=64, frames=13, fps=8, steps=STEPS, guidance_scale=2.0, seed=7
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


class Schedule:
    """One video under leases as they are drawn. ``said`` tells what was done, for a failure's message."""

    def __init__(self, stage: DenoisingStage, chance: random.Random, job_id: str) -> None:
        self._stage = stage
        self._chance = chance
        self._job_id = job_id
        self.said: list[str] = []

    @property
    def degrees(self) -> tuple[int, ...]:
        """On how many workers each step ran."""
        return tuple(report.degree_of_parallelism for report in self._stage.of_job(self._job_id))

    async def unchanged(self, degree: int) -> torch.Tensor:
        """All steps under one lease."""
        return await self._stage.finished(await self._start(degree))

    async def changing(self) -> torch.Tensor:
        """Up to four changes, each after some steps or at once."""
        lease = await self._start(self._degree())
        begun = lease.epoch
        for _ in range(self._chance.randrange(1, 5)):
            await self._some_steps(lease)
            if self._chance.random() < 0.25:
                elsewhere = await self._elsewhere(lease)
                if elsewhere is None:
                    break
                lease, begun = elsewhere, elsewhere.epoch
            else:
                lease = await self._changed(lease)
        return await self._stage.finished(lease, begun)

    def _degree(self) -> int:
        return self._chance.choice((1, 2, 4))

    async def _start(self, degree: int) -> Lease:
        members = tuple(self._chance.sample(WORKERS, degree))
        self.said.append(f"start on {members}")
        return await self._stage.start_job(members, REQUEST, self._job_id)

    async def _changed(self, lease: Lease) -> Lease:
        """Any others join or leave, but for the leader."""
        others = [instance for instance in WORKERS if instance != lease.leader]
        members = (lease.leader, *self._chance.sample(others, self._degree() - 1))
        self.said.append(f"{members} from step {len(self.degrees)}")
        return await self._stage.change(lease, *members)

    async def _elsewhere(self, lease: Lease) -> Lease | None:
        """Parked, and gone on with by anybody; None: it came to its end before."""
        parked = await self._stage.park(lease)
        if parked is None:
            return None
        step = parked.step
        resume = await self._stage.checkpoints.newest(self._job_id)
        assert (resume.step if resume is not None else 0) == step
        members = tuple(self._chance.sample(WORKERS, self._degree()))
        self.said.append(f"parked after step {step}, then {members}")
        return await self._stage.start_job(members, REQUEST, self._job_id, resume)

    async def _some_steps(self, lease: Lease) -> None:
        """Some under this lease; none at times, so that a change finds the one before it not in effect yet."""
        count = self._chance.choice((0, 1, 1, 2, 3))
        await self._stage.until(lambda: len(self._stage.steps[lease.epoch]) >= count or self._stage.done(lease))
        await asyncio.sleep(self._chance.random() * 0.01)


@pytest.mark.parametrize("guidance_parallel", [True, False], ids=["guidance parallel", "guidance together"])
async def test_every_schedule_gives_the_latent_of_one_worker(
    model: Path, tmp_path: Path, guidance_parallel: bool
) -> None:
    chance = random.Random(f"{SEED} {guidance_parallel}")
    settings = {"TRIPTYCH_GUIDANCE_PARALLEL": str(guidance_parallel)} | PATIENT
    async with denoising_stage(model, tmp_path) as stage:
        await stage.start("cache_store-0")
        for instance in WORKERS:
            await stage.start(instance, **settings)
        await stage.ready("cache_store-0", *WORKERS)
        expected = await Schedule(stage, chance, "alone").unchanged(1)
        known: dict[tuple[int, ...], torch.Tensor] = {(1,) * STEPS: expected}
        for number in range(SCHEDULES):
            schedule = Schedule(stage, chance, f"video_{number}")
            latent = await (schedule.unchanged((2, 4, 2)[number]) if number < 3 else schedule.changing())
            said = f"seed {SEED}, {schedule.said}"
            # The last step is told by an event, the end by a request that may overtake it.
            await stage.until(lambda schedule=schedule: len(schedule.degrees) >= STEPS)
            steps = [report.step for report in stage.of_job(f"video_{number}")]
            assert steps == list(range(1, STEPS + 1)), f"{said}: each step once, not {steps}"
            torch.testing.assert_close(
                latent, expected, atol=ATOL, rtol=0.0, msg=lambda text, said=said: f"{said}: {text}"
            )
            # Whoever the members are: as many of them sum in the same order.
            degrees = schedule.degrees
            runs = [(degree, len(list(run))) for degree, run in groupby(degrees)]
            assert torch.equal(latent, known.setdefault(degrees, latent)), f"{said}: not the bits of {runs}"
        await _parked_while_the_cache_store_stands_still(stage)
        assert stage.failures == [] and stage.lost == []


async def _parked_while_the_cache_store_stands_still(stage: DenoisingStage) -> None:
    """For longer than a checkpoint of a job that goes on is waited for: no step is lost."""
    endless = REQUEST.model_copy(update={"steps": 5000})
    lease = await stage.start_job(WORKERS[:1], endless, "kept")
    await stage.until(lambda: bool(stage.steps[lease.epoch]))
    stage.signal("cache_store-0", signal.SIGSTOP)
    parking = asyncio.create_task(stage.park(lease))
    await asyncio.sleep(2 * STORE_DEADLINE_S + 0.5)
    stage.signal("cache_store-0", signal.SIGCONT)
    parked = await parking
    resume = await stage.checkpoints.newest("kept")
    assert parked is not None and resume is not None and resume.step == parked.step
