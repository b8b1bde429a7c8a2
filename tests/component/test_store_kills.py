"""With two cache stores neither's death costs a video what was done, not even together with that of its worker.

The real scheduler and DiT workers. Where and when kills fall is drawn anew each time; ``TRIPTYCH_TEST_SEED`` repeats a
draw, ``TRIPTYCH_TEST_KILLS`` sets how many videos are disturbed.
"""

import asyncio
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.messages.video import VideoRequest
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec
from common.policies.video.rib import KindProfile, Rib, VideoKind
from tests.support.cluster import DIT, Cluster, running_cluster
from tests.support.small_model import save_small_model

KILLS = int(os.environ.get("TRIPTYCH_TEST_KILLS", "3"))
SEED = int(os.environ["TRIPTYCH_TEST_SEED"])
STORES = ("cache_store-0", "cache_store-1")
SERVICES = ("scheduler-0", "encoder-0", *STORES, *DIT)
STEPS = 40
K = 4
REQUEST = VideoRequest(
    model="small", prompt="", width=64, height=64, frames=13, fps=8, steps=STEPS, guidance_scale=2.0, seed=7
)
# More than one GPU gains nothing.
ALONE = Rib({VideoKind(64, 64, 13): KindProfile({1: 0.1, 2: 0.1, 4: 0.1}, decode_s=0.01)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    pipeline = OpenSoraPipeline(load_spec(model))
    return pipeline.generate(
        REQUEST.prompt,
        REQUEST.seed,
        steps=STEPS,
        guidance_scale=REQUEST.guidance_scale,
        frames=REQUEST.frames,
        width=REQUEST.width,
        height=REQUEST.height,
        fps=REQUEST.fps,
    ).latent


@dataclass(frozen=True)
class Disturbance:
    """Who was killed when a video had so many ``steps`` done under the lease ``epoch``, as far as was heard."""

    victims: tuple[str, ...]
    steps: int
    epoch: int


async def disturb(cluster: Cluster, job_id: str, chance: random.Random) -> Disturbance:
    """Kill a cache store, alone or together with the video's worker, at any moment of the video."""
    done = cluster.steps[job_id]
    step = chance.randrange(1, STEPS - 2)
    await cluster.until(lambda: any(report.step >= step for report in done))
    await asyncio.sleep(chance.random() * 0.02)
    lease, store = cluster.leases[job_id][-1], chance.choice(STORES)
    victims = chance.choice(((store,), (store, lease.leader), (lease.leader, store)))
    disturbance = Disturbance(victims, done[-1].step, lease.epoch)
    await cluster.restart(*victims)
    return disturbance


async def test_a_cache_store_takes_no_checkpoint_with_it(model: Path, tmp_path: Path, expected: torch.Tensor) -> None:
    chance = random.Random(SEED)
    settings = {"TRIPTYCH_CHECKPOINT_STEPS": str(K)}
    async with running_cluster(model, tmp_path, "ddit", ALONE, SERVICES, **settings) as cluster:
        certain = 0
        for number in range(KILLS):
            job_id = f"video_{number}"
            await cluster.submit(job_id, REQUEST)
            killed = await disturb(cluster, job_id, chance)
            latent = await cluster.completed(job_id)
            reports = cluster.steps[job_id]
            in_both = [told.step for told in cluster.stored[job_id] if told.copies == 2 and told.epoch <= killed.epoch]
            later = [report.step for report in reports if report.epoch > killed.epoch]
            again = len(reports) - len({report.step for report in reports})
            said = f"seed {SEED}, run {number}, {killed}: in both stores {in_both}, then {later}, {again} done again"
            assert torch.equal(latent, expected), said
            assert all(step > max(in_both, default=0) for step in later), said
            certain += len(in_both)
            print(said)  # noqa: T201
            await cluster.ready(*SERVICES)
    assert certain, "no checkpoint had a second copy"
