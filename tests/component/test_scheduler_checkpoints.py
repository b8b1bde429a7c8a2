"""The scheduler and checkpoints: a lease goes on where the cache store says, and without one the job begins again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.bus.nats_bus import NatsBus
from common.messages.cache import DropTensor, FindTensor, TensorFound
from common.messages.cluster import Service
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    CHECKPOINT_STORED,
    DROP_TENSOR,
    FIND_TENSOR,
    VIDEO_PROGRESS,
    VIDEO_TIMELINES,
)
from common.messages.tensors import TensorRef
from common.messages.video import Checkpoint, CheckpointStored, Lease, VideoState, checkpoint_key
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from tests.component.test_scheduler import REQUEST, Heard, Stage, recorded, stage
from tests.support.bus import eventually
from tests.support.nats_server import NatsServer
from tests.support.workers import WAIT_S, PlayedWorker, played_worker

LATENT = TensorRef(owner="cache_store-0", tensor_id=5, address=b"there", shape=(1,), dtype="float32", size_bytes=4)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept somewhere is found, however slow this machine is just now."""
    for wait in ("STEP_DEADLINE_S", "FIND_DEADLINE_S", "RESTART_S"):
        monkeypatch.setattr(f"services.scheduler.checkpoints.{wait}", WAIT_S)
    for wait in ("LATENT_DEADLINE_S", "HEARD_DEADLINE_S"):
        monkeypatch.setattr(f"services.scheduler.workers.{wait}", WAIT_S)


@dataclass
class PlayedCacheStore:
    """Answers the scheduler as far as a test lets it. ``steps``: the newest checkpoint of each job, by its key."""

    steps: dict[str, int] = field(default_factory=dict)
    asked: list[FindTensor] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    silent: bool = False

    async def find(self, request: FindTensor) -> TensorFound:
        self.asked.append(request)
        if self.silent:
            await asyncio.sleep(10 * WAIT_S)
        step = self.steps.get(request.key)
        ref = LATENT if step is not None and request.uses else None
        return TensorFound(key=request.key, tensor_version=step, tensor=ref)

    async def drop(self, request: DropTensor) -> Acknowledged:
        self.dropped.append(request.key)
        return Acknowledged()


@contextlib.asynccontextmanager
async def cache_store(url: str) -> AsyncIterator[PlayedCacheStore]:
    store = PlayedCacheStore()
    async with await NatsBus.connect(url, name="cache_store-0") as bus:
        await bus.serve(FIND_TENSOR, store.find)
        await bus.serve(DROP_TENSOR, store.drop)
        yield store


async def checkpoint(play: Stage, store: PlayedCacheStore, lease: Lease, step: int) -> None:
    """A DiT worker has brought a checkpoint to the cache store."""
    store.steps[checkpoint_key(lease.job_id)] = step
    stored = CheckpointStored(job_id=lease.job_id, epoch=lease.epoch, step=step)
    await play.dit.bus.publish(CHECKPOINT_STORED, stored, lease.job_id)


async def first_lease(*workers: PlayedWorker) -> Lease:
    """The next lease of any of them."""
    waiting = [asyncio.create_task(worker.next_lease()) for worker in workers]
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return done.pop().result()


async def test_a_job_whose_worker_is_lost_goes_on_from_its_checkpoint(nats_server: NatsServer, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    async with stage(nats_server.url, record=record) as play, cache_store(nats_server.url) as store:
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        assert lease.resume is None
        assert store.asked == [], "nobody asks about a job that was never under way"
        await play.dit.do_step(lease, 1)
        await checkpoint(play, store, lease, 1)
        await play.dit.do_step(lease, 2)
        await heard.until(lambda last: last.step == 2)
        await recorded(record, '"CheckpointStored"')
        await play.dit.leave()
        await play.reaches("video_a", VideoState.ENCODING, attempt=2)
        # Step 2 is lost, step 1 is not.
        await heard.until(lambda last: (last.state, last.step) == (VideoState.ENCODING, 1))
        await play.dit.join(play.url)
        again = await play.dit.next_lease()
        assert again.resume == Checkpoint(step=1, latent=LATENT)
        await heard.until(lambda last: (last.state, last.step) == (VideoState.DENOISING, 1))
        await play.dit.do_step(again, 2)
        await heard.until(lambda last: last.step == 2)
        await play.dit.finish_denoising(again)
        await play.vae.finish_decoding(await play.vae.next_decoding())
        await play.reaches("video_a", VideoState.COMPLETED)
        steps = [progress.step for progress in heard.all]
        assert min(steps[steps.index(1) :]) == 1, "progress never goes back further than the checkpoint"
        timeline = (await play.bus.get(VIDEO_TIMELINES, "video_a")).value
        assert [(span.phase, span.step) for span in timeline.spans] == [
            ("step", 1),
            ("encode", None),
            ("step", 2),
            ("decode", None),
        ]
        await eventually(lambda: set(store.dropped) == {checkpoint_key("video_a")})


async def test_a_lost_decoder_costs_no_step(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play, cache_store(nats_server.url) as store:
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await checkpoint(play, store, lease, REQUEST.steps)
        await play.dit.finish_denoising(lease)
        await play.vae.next_decoding()
        await play.vae.leave()
        again = await play.dit.next_lease()
        assert again.resume == Checkpoint(step=REQUEST.steps, latent=LATENT)
        await play.dit.finish_denoising(again)
        await play.vae.join(play.url)
        await play.vae.finish_decoding(await play.vae.next_decoding())
        assert (await play.reaches("video_a", VideoState.COMPLETED)).attempt == 2


async def test_a_silent_cache_store_costs_a_moment_and_no_job(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.scheduler.checkpoints.FIND_DEADLINE_S", 1.0)
    async with stage(nats_server.url) as play, cache_store(nats_server.url) as store:
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        store.silent = True
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await play.dit.do_step(lease, 1)
        await checkpoint(play, store, lease, 1)
        await heard.until(lambda last: last.step == 1)
        await play.dit.fail(lease, "tensor_not_fetched", retryable=True)
        again = await play.dit.next_lease()
        assert again.resume is None
        # It begins again, and says so.
        await heard.until(lambda last: (last.state, last.step) == (VideoState.DENOISING, 0))
        await play.dit.finish_denoising(again)
        await play.vae.finish_decoding(await play.vae.next_decoding())
        await play.reaches("video_a", VideoState.COMPLETED)


async def test_a_cache_store_that_is_being_started_again_is_waited_for(nats_server: NatsServer) -> None:
    url = nats_server.url
    settings = ServiceSettings(nats_url=url, instance="cache_store-0", heartbeat_s=0.1)
    # Known to the scheduler from the beginning: it dies with the DiT worker, and its record is there, as between two
    # lives.
    async with stage(url) as play, Registration(play.bus, settings, Service.CACHE_STORE):
        async with cache_store(url) as store:
            await play.submit("video_a")
            lease = await play.dit.next_lease()
            await checkpoint(play, store, lease, 1)
        await play.dit.fail(lease, "lost", retryable=True)
        await play.reaches("video_a", VideoState.ENCODING, attempt=2)
        await asyncio.sleep(0.5)
        assert play.dit.leases.empty()
        async with cache_store(url) as store:
            store.steps[checkpoint_key("video_a")] = 1
            assert (await play.dit.next_lease()).resume == Checkpoint(step=1, latent=LATENT)


async def test_a_new_scheduler_knows_how_far_a_job_has_come(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play, cache_store(nats_server.url) as store:
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await play.dit.do_step(lease, 1)
        await checkpoint(play, store, lease, 1)
        await play.scheduler.kill()
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        play.scheduler.start()
        again = await play.dit.next_lease()
        assert again.resume == Checkpoint(step=1, latent=LATENT)
        await play.dit.do_step(again, 2)
        await heard.until(lambda last: last.step == 2)
        assert {progress.step for progress in heard.all} == {1, 2}
        assert store.dropped == []


@pytest.mark.parametrize("kept", [{"dit-0": 2, "dit-1": 3}, {"dit-0": 3, "dit-1": 2}, {"dit-1": 1}], ids=str)
async def test_a_new_scheduler_has_the_furthest_latent_handed_on(nats_server: NatsServer, kept: dict[str, int]) -> None:
    """To whoever is to go on, the first that is welcomed; where nobody has more than the cache store, that is asked."""
    async with stage(nats_server.url) as play, cache_store(nats_server.url) as store:
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await checkpoint(play, store, lease, 1)
        await play.scheduler.kill()
        async with played_worker(nats_server.url, Service.DIT, 1) as other:
            for worker in (play.dit, other):
                if worker.instance in kept:
                    worker.kept["video_a"] = kept[worker.instance]
            play.scheduler.start()
            again = await first_lease(play.dit, other)
            furthest = max(kept, key=kept.__getitem__)
            latent = (play.dit if furthest == "dit-0" else other).ref(kept[furthest])
            expected = Checkpoint(step=kept[furthest], latent=latent) if kept[furthest] > 1 else None
            assert again.resume == (expected or Checkpoint(step=1, latent=LATENT))


async def test_how_far_a_job_has_come_is_known_as_soon_as_the_cache_store_is_back(nats_server: NatsServer) -> None:
    """The whole stack was started again, and the scheduler was there first."""
    url = nats_server.url
    async with stage(url) as play:
        async with cache_store(url) as store:
            await play.submit("video_a")
            lease = await play.dit.next_lease()
            await play.dit.do_step(lease, 1)
            await checkpoint(play, store, lease, 1)
        await play.scheduler.kill()
        await play.dit.leave()
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        play.scheduler.start()
        await heard.until(lambda last: last.step == 0)
        settings = ServiceSettings(nats_url=url, instance="cache_store-0", heartbeat_s=0.1)
        async with cache_store(url) as store, Registration(play.bus, settings, Service.CACHE_STORE) as registration:
            store.steps[checkpoint_key("video_a")] = 1
            await registration.ready()
            told = await heard.until(lambda last: last.step == 1)
            assert told.degree_of_parallelism == 0, "nobody works on it yet"


async def test_a_cancelled_jobs_checkpoint_is_dropped(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play, cache_store(nats_server.url) as store:
        await play.submit("video_a")
        await play.dit.next_lease()
        await play.cancel("video_a")
        await play.dit.next_revoked()
        await eventually(lambda: checkpoint_key("video_a") in store.dropped)
        await play.submit("video_b")
        await play.dit.fail(await play.dit.next_lease(), "denoising_failed", retryable=False)
        await play.reaches("video_b", VideoState.FAILED)
        await eventually(lambda: checkpoint_key("video_b") in store.dropped)


async def test_what_a_lost_life_stored_late_does_not_move_the_bar(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play, cache_store(nats_server.url):
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await play.dit.leave()
        async with played_worker(play.url, Service.DIT, 0) as other:
            again = await other.next_lease()
            assert again.resume is None
            stored = CheckpointStored(job_id="video_a", epoch=lease.epoch, step=2)
            await play.dit.bus.publish(CHECKPOINT_STORED, stored, "video_a")
            await other.do_step(again, 1)
            await heard.until(lambda last: last.step == 1)
            assert {progress.step for progress in heard.all} == {0, 1}
