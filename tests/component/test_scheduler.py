"""The scheduler process's work over a real broker: jobs go their way, and none is lost whatever dies."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.bus.errors import BusError, KeyMissing
from common.bus.nats_bus import NatsBus
from common.bus.port import Change
from common.messages.cluster import Service
from common.messages.subjects import (
    VIDEO_BUCKETS,
    VIDEO_FILES,
    VIDEO_JOBS,
    VIDEO_OBJECTS,
    VIDEO_PROGRESS,
    VIDEO_QUEUES,
    VIDEO_RECORDS,
    VIDEO_TIMELINES,
)
from common.messages.video import VideoProgress, VideoQueued, VideoRecord, VideoRequest, VideoState
from common.runtime.leases import REPORT_DEADLINE_S, REPORT_PAUSE_S
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import serve
from tests.component.gateway_support import until
from tests.support.bus import eventually
from tests.support.nats_server import NatsServer
from tests.support.workers import WAIT_S, PlayedWorker, played_worker

REQUEST = VideoRequest(
    model="demo", prompt="a red circle", width=64, height=64, frames=16, fps=8, steps=2, guidance_scale=2.0, seed=1
)


class SchedulerProcess:
    """The scheduler's own ``serve``, started and stopped as its process would be."""

    def __init__(self, url: str, **settings: object) -> None:
        # Longer than this machine ever stalls: only the tests about silence make it short.
        quick = {"heartbeat_s": 0.1, "member_timeout_s": 20.0, "drain_s": WAIT_S}
        self._settings = SchedulerSettings.model_validate(
            {"nats_url": url, "instance": "scheduler-0"} | quick | settings
        )
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def start(self) -> None:
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(serve(self._settings, self._stop))

    async def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            await asyncio.wait_for(self._task, WAIT_S)
            self._task = None


class Heard:
    """Progress as a client hears it."""

    def __init__(self) -> None:
        self.all: list[VideoProgress] = []
        self._awaited = 0
        self._news = asyncio.Event()

    def __call__(self, progress: VideoProgress) -> None:
        self.all.append(progress)
        self._news.set()

    async def until(self, seen: Callable[[VideoProgress], bool]) -> VideoProgress:
        """The first that is ``seen``, from the one on for which was waited before; several may come at once."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for place in range(self._awaited, len(self.all)):
                    if seen(self.all[place]):
                        self._awaited = place
                        return self.all[place]
                self._news.clear()
                await self._news.wait()


@dataclass
class Stage:
    """A scheduler with one slot, its workers played by the test, and a client's view of the bus."""

    url: str
    bus: NatsBus
    scheduler: SchedulerProcess
    encoder: PlayedWorker
    dit: PlayedWorker
    vae: PlayedWorker

    async def submit(self, job_id: str, request: VideoRequest = REQUEST, *, queue: bool = True) -> None:
        now_s = time.time()
        record = VideoRecord(
            job_id=job_id, state=VideoState.QUEUED, request=request, created_at_s=now_s, updated_at_s=now_s
        )
        await self.bus.create(VIDEO_RECORDS, job_id, record)
        if queue:
            await self.bus.enqueue(VIDEO_JOBS, VideoQueued(job_id=job_id), job_id)

    async def cancel(self, job_id: str) -> None:
        entry = await self.bus.get(VIDEO_RECORDS, job_id)
        ended = entry.value.moved(VideoState.CANCELLED, time.time())
        await self.bus.replace(VIDEO_RECORDS, job_id, ended, entry.revision)

    async def reaches(self, job_id: str, state: VideoState, attempt: int = 1) -> VideoRecord:
        """The record once it is in ``state``, in that attempt or a later one."""
        async with asyncio.timeout(WAIT_S):
            async for change in self.bus.watch(VIDEO_RECORDS, job_id):
                record = change.value if isinstance(change, Change) else None
                if record is not None and record.state is state and record.attempt >= attempt:
                    return record
        raise AssertionError("the watch ended")

    async def complete(self, job_id: str) -> VideoRecord:
        """Play the workers for a job that has no lease yet, to its end."""
        lease = await self.dit.next_lease()
        assert lease.job_id == job_id
        await self.dit.finish_denoising(lease)
        await self.vae.finish_decoding(await self.vae.next_decoding())
        return await self.reaches(job_id, VideoState.COMPLETED)


@contextlib.asynccontextmanager
async def stage(url: str, **settings: object) -> AsyncIterator[Stage]:
    bus = await NatsBus.connect(url, name="client")
    await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
    scheduler = SchedulerProcess(url, **settings)
    scheduler.start()
    try:
        async with (
            played_worker(url, Service.ENCODER) as encoder,
            played_worker(url, Service.DIT, 0) as dit,
            played_worker(url, Service.VAE, 0) as vae,
        ):
            yield Stage(url, bus, scheduler, encoder, dit, vae)
    finally:
        await scheduler.kill()
        await bus.close()


async def recorded(record: Path, what: str, times: int = 1) -> None:
    """Return once the scheduler has told its policy something so often."""
    await eventually(lambda: record.exists() and record.read_text().count(what) >= times)


async def test_a_job_from_queue_to_file_with_progress_and_timeline(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        heard = Heard()
        listening = await play.bus.subscribe(VIDEO_PROGRESS, heard)
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        assert (lease.members, lease.leader, lease.request) == (("dit-0",), "dit-0", REQUEST)
        await play.dit.do_step(lease, 1)
        await heard.until(lambda last: last.step == 1)
        await play.dit.do_step(lease, 2)
        await heard.until(lambda last: last.step == 2)
        await play.dit.finish_denoising(lease)
        work = await play.vae.next_decoding()
        assert work.latent == play.dit.ref(lease.epoch)
        await heard.until(lambda last: last.state is VideoState.DECODING)
        file = await play.vae.finish_decoding(work)
        record = await play.reaches("video_a", VideoState.COMPLETED)
        assert (record.file, record.attempt, record.failure) == (file, 1, None)
        stored = b"".join([chunk async for chunk in play.bus.get_object(VIDEO_FILES, file.object_name)])
        assert stored == b"the file of video_a"
        timeline = (await play.bus.get(VIDEO_TIMELINES, "video_a")).value
        assert [(span.phase, span.step) for span in timeline.spans] == [
            ("encode", None),
            ("step", 1),
            ("step", 2),
            ("decode", None),
        ]
        # The broker deletes what is acknowledged a moment after it has heard of it.
        await until(lambda: _nothing_queued(play))
        await heard.until(lambda last: last.state is VideoState.COMPLETED)
        steps = [progress.step for progress in heard.all]
        assert steps == sorted(steps)
        assert {1, 2} <= set(steps)
        states = [progress.state for progress in heard.all]
        assert list(dict.fromkeys(states))[-3:] == [VideoState.DENOISING, VideoState.DECODING, VideoState.COMPLETED]
        await listening.stop()


async def test_the_end_of_a_phase_may_overtake_what_was_told_of_it(nats_server: NatsServer) -> None:
    """A step is told by an event, the last one's end by a request; a decoder may be done before its yes is here."""
    async with stage(nats_server.url) as play:
        heard = Heard()
        await play.bus.subscribe(VIDEO_PROGRESS, heard)
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await play.dit.do_step(lease, 1)
        await heard.until(lambda last: last.step == 1)
        play.vae.free.clear()
        await play.dit.finish_denoising(lease)
        work = await play.vae.next_decoding()
        await heard.until(lambda last: last.state is VideoState.DECODING)
        await play.dit.do_step(lease, 2)
        await heard.until(lambda last: last.step == 2)
        await play.vae.finish_decoding(work)
        play.vae.free.set()
        await play.reaches("video_a", VideoState.COMPLETED)
        timeline = (await play.bus.get(VIDEO_TIMELINES, "video_a")).value
        assert [span.step for span in timeline.spans if span.phase == "step"] == [1, 2]


async def until_told(report: Callable[[], Awaitable[object]]) -> None:
    """Report again and again until the scheduler has heard it, as workers do."""
    while True:
        with contextlib.suppress(BusError, TimeoutError):
            await asyncio.wait_for(report(), REPORT_DEADLINE_S)
            return
        await asyncio.sleep(REPORT_PAUSE_S)


async def _nothing_queued(play: Stage) -> bool:
    return await play.bus.queue_depth(VIDEO_JOBS) == 0


async def test_cancel_frees_the_gpu_for_the_next(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        await play.submit("video_b")
        lease = await play.dit.next_lease()
        await play.cancel("video_a")
        revoked = await play.dit.next_revoked()
        assert (revoked.job_id, revoked.epoch) == ("video_a", lease.epoch)
        await play.complete("video_b")
        assert (await play.bus.get(VIDEO_RECORDS, "video_a")).value.state is VideoState.CANCELLED


async def test_cancel_while_decoding_stops_the_decoder(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        await play.dit.finish_denoising(await play.dit.next_lease())
        work = await play.vae.next_decoding()
        await play.cancel("video_a")
        assert (await play.vae.next_cancelled()).epoch == work.epoch
        # The decoder's report crosses the cancellation: it changes nothing.
        await play.vae.finish_decoding(work)
        assert (await play.bus.get(VIDEO_RECORDS, "video_a")).value.state is VideoState.CANCELLED


async def test_a_deleted_job_is_let_go(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        await play.dit.next_lease()
        await play.bus.delete(VIDEO_RECORDS, "video_a")
        await play.dit.next_revoked()
        await play.submit("video_b")
        await play.complete("video_b")
        with contextlib.suppress(KeyMissing):
            raise AssertionError((await play.bus.get(VIDEO_RECORDS, "video_a")).value)


async def test_a_lost_dit_worker_costs_the_job_an_attempt_not_its_life(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        first = await play.dit.next_lease()
        await play.dit.leave()
        # It waits in the queue again, and its prompt is encoded again, for a DiT worker that is not there yet.
        assert (await play.reaches("video_a", VideoState.ENCODING)).attempt == 2
        await play.dit.join(play.url)
        lease = await play.dit.next_lease()
        assert lease.epoch > first.epoch
        # What the lost life still says is ignored.
        await play.dit.finish_denoising(first)
        assert play.vae.decodings.empty()
        await play.dit.finish_denoising(lease)
        work = await play.vae.next_decoding()
        assert work.epoch == lease.epoch
        await play.vae.finish_decoding(work)
        assert (await play.reaches("video_a", VideoState.COMPLETED)).attempt == 2


async def test_a_silent_worker_is_lost_after_the_timeout(nats_server: NatsServer) -> None:
    # Longer than a broker on a busy machine stands still, which has nobody's life signs heard.
    async with stage(nats_server.url, member_timeout_s=4.0) as play:
        await play.submit("video_a")
        await play.dit.next_lease()
        # Its connection is gone, its record stands: as after a kill -9 that nobody cleaned up behind.
        await play.dit.bus.close()
        await play.reaches("video_a", VideoState.ENCODING, attempt=2)
        async with played_worker(play.url, Service.DIT, 0) as other:
            play.dit = other
            assert (await play.complete("video_a")).attempt >= 2


async def test_a_worker_that_does_not_answer_is_not_asked_again_before_it_lives(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    async with stage(nats_server.url, record=record) as play:
        await recorded(record, '"WorkerJoined"', 3)
        # Killed this very moment: its record stands and its last life sign is fresh, but it hears nothing.
        await play.dit.bus.close()
        await play.submit("video_a")
        await play.reaches("video_a", VideoState.ENCODING, attempt=2)
        await asyncio.sleep(0.5)
        record = (await play.bus.get(VIDEO_RECORDS, "video_a")).value
        assert (record.state, record.attempt) == (VideoState.ENCODING, 2)
        async with played_worker(play.url, Service.DIT, 0) as other:
            play.dit = other
            assert (await play.complete("video_a")).attempt == 2


async def test_failures_that_may_pass_are_tried_again_and_final_ones_are_told(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        await play.dit.fail(await play.dit.next_lease(), "tensor_not_fetched", retryable=True)
        lease = await play.dit.next_lease()
        await play.dit.fail(lease, "denoising_failed", retryable=False)
        record = await play.reaches("video_a", VideoState.FAILED)
        assert record.failure is not None
        assert (record.failure.code, record.failure.message) == ("denoising_failed", "denoising_failed happened")
        assert record.attempt == 2


async def test_a_new_scheduler_takes_over_what_the_old_one_left(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        old = await play.dit.next_lease()
        await play.submit("video_b")
        await play.scheduler.kill()
        await play.submit("video_c")
        play.scheduler.start()
        for job_id in ("video_a", "video_b", "video_c"):
            lease = await play.dit.next_lease()
            assert lease.job_id == job_id
            assert lease.epoch > old.epoch + 1_000_000
            await play.dit.finish_denoising(lease)
            await play.vae.finish_decoding(await play.vae.next_decoding())
            await play.reaches(job_id, VideoState.COMPLETED)


async def test_a_broker_restart_loses_nothing(nats_server: NatsServer) -> None:
    async with stage(nats_server.url) as play:
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await nats_server.kill()
        await asyncio.sleep(0.3)
        await nats_server.start()

        # The scheduler may count the silence as a loss and start again, or go on: either way the job ends once.
        async def denoise() -> None:
            await until_told(partial(play.dit.finish_denoising, lease))
            while True:
                await until_told(partial(play.dit.finish_denoising, await play.dit.leases.get()))

        async def decode() -> None:
            while True:
                await until_told(partial(play.vae.finish_decoding, await play.vae.decodings.get()))

        working = [asyncio.create_task(denoise()), asyncio.create_task(decode())]
        await play.reaches("video_a", VideoState.COMPLETED)
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def test_stopping_lets_what_runs_come_to_its_end_and_keeps_the_rest(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    async with stage(nats_server.url, record=record) as play:
        await play.submit("video_a")
        lease = await play.dit.next_lease()
        await play.submit("video_b")
        stopping = asyncio.create_task(play.scheduler.stop())
        await recorded(record, '"DrainRequested"')
        await play.dit.finish_denoising(lease)
        await play.vae.finish_decoding(await play.vae.next_decoding())
        await stopping
        assert (await play.bus.get(VIDEO_RECORDS, "video_a")).value.state is VideoState.COMPLETED
        assert not (await play.bus.get(VIDEO_RECORDS, "video_b")).value.state.terminal
        assert play.dit.leases.empty()
