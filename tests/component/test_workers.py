"""Encoder, DiT and VAE as real processes, over real NATS and UCX, with the test as their scheduler.

What they make together equals what the same phases make in one process: latent for latent, byte for byte.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from common.bus.errors import RemoteFailure
from common.bus.nats_bus import NatsBus
from common.messages.base import Message
from common.messages.failures import Acknowledged
from common.messages.subjects import (
    DECODE_VIDEO,
    DECODING_FINISHED,
    DENOISING_FINISHED,
    ENCODE_PROMPT,
    GRANT_LEASE,
    PHASE_FAILED,
    REVOKE_LEASE,
    STEP_FINISHED,
    VIDEO_BUCKETS,
    VIDEO_FILES,
    VIDEO_OBJECTS,
    VIDEO_QUEUES,
)
from common.messages.tensors import TensorRef
from common.messages.video import (
    DecodeVideo,
    DecodingFinished,
    DenoisingFinished,
    EncodePrompt,
    Lease,
    PhaseFailed,
    PromptEncoded,
    RevokeLease,
    StepFinished,
    VideoRequest,
)
from common.models.mp4 import Mp4Encoder
from common.models.opensora.pipeline import GeneratedVideo, OpenSoraPipeline
from common.models.opensora.spec import load_spec
from common.runtime.membership import MemberJoined, MembershipView
from common.tensors.errors import TensorUnknown
from common.tensors.ucx import UcxTensors
from tests.support.bus import eventually
from tests.support.nats_server import nats_server_process
from tests.support.small_model import save_small_model

Report = TypeVar("Report", bound=Message)

WAIT_S = 120.0
PROMPT = "a red circle moves left"
STEPS = 4


def request(**changes: object) -> VideoRequest:
    values = {
        "model": "small",
        "prompt": PROMPT,
        "width": 32,
        "height": 32,
        "frames": 13,
        "fps": 8,
        "steps": STEPS,
        "guidance_scale": 2.0,
        "seed": 7,
    }
    return VideoRequest.model_validate(values | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(model: Path) -> OpenSoraPipeline:
    torch.set_num_threads(1)
    return OpenSoraPipeline(load_spec(model))


@dataclass
class Workers:
    """The worker processes, by instance."""

    url: str
    model: Path
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, service: str) -> None:
        environment = os.environ | {
            "TRIPTYCH_NATS_URL": self.url,
            "TRIPTYCH_INSTANCE": f"{service}-0",
            "TRIPTYCH_SLOT": "0",
            "TRIPTYCH_VIDEO_MODEL": str(self.model),
            "TRIPTYCH_DRAIN_S": str(WAIT_S),
            "OMP_NUM_THREADS": "1",
        }
        with (self.logs / f"{service}.log").open("ab") as log:
            command = [sys.executable, "-m", f"services.{service}"]
            self.processes[f"{service}-0"] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(WAIT_S)


@pytest.fixture(scope="module")
def workers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with nats_server_process() as server:
        running = Workers(server.url, model, tmp_path_factory.mktemp("logs"))
        try:
            for service in ("encoder", "dit", "vae"):
                running.start(service)
            yield running
        finally:
            running.kill()


@dataclass
class Reports:
    """What the workers tell their scheduler."""

    steps: asyncio.Queue[StepFinished] = field(default_factory=lambda: asyncio.Queue(1000))
    latents: asyncio.Queue[DenoisingFinished] = field(default_factory=lambda: asyncio.Queue(100))
    files: asyncio.Queue[DecodingFinished] = field(default_factory=lambda: asyncio.Queue(100))
    failures: asyncio.Queue[PhaseFailed] = field(default_factory=lambda: asyncio.Queue(100))


def heard_once(queue: asyncio.Queue[Report]) -> Callable[[Report], Awaitable[Acknowledged]]:
    """Takes reports: what is told again, because no answer has come soon enough, is one report."""
    heard: list[Report] = []

    async def hear(report: Report) -> Acknowledged:
        if report not in heard:
            heard.append(report)
            queue.put_nowait(report)
        return Acknowledged()

    return hear


class PlayedScheduler:
    """Asks the workers, hears them, and fetches what they made."""

    def __init__(self, bus: NatsBus, tensors: UcxTensors, first_epoch: int) -> None:
        self.bus = bus
        self.tensors = tensors
        self.reports = Reports()
        self._epoch = first_epoch

    async def encode(self, asked: VideoRequest) -> PromptEncoded:
        message = EncodePrompt(job_id="job", prompt=asked.prompt, negative_prompt=asked.negative_prompt)
        return await self.bus.request(ENCODE_PROMPT, message, "encoder-0", deadline_s=WAIT_S)

    def lease(self, asked: VideoRequest, encoded: PromptEncoded, job_id: str = "job") -> Lease:
        self._epoch += 1
        return Lease(
            job_id=job_id,
            epoch=self._epoch,
            members=("dit-0",),
            leader="dit-0",
            request=asked,
            text=encoded.text,
            negative=encoded.negative,
        )

    async def grant(self, lease: Lease) -> None:
        await self.bus.request(GRANT_LEASE, lease, "dit-0", deadline_s=WAIT_S)

    async def denoised(self, asked: VideoRequest) -> DenoisingFinished:
        await self.grant(self.lease(asked, await self.encode(asked)))
        return await asyncio.wait_for(self.reports.latents.get(), WAIT_S)

    async def fetched(self, ref: TensorRef) -> torch.Tensor:
        return await self.tensors.fetch(ref, deadline_s=WAIT_S)

    async def decoded(self, asked: VideoRequest, latent: torch.Tensor, epoch: int) -> bytes:
        ref = self.tensors.export(latent, uses=1, lease_s=WAIT_S)
        work = DecodeVideo(job_id="job", epoch=epoch, request=asked, latent=ref, object_name=f"job/{epoch}.mp4")
        await self.bus.request(DECODE_VIDEO, work, "vae-0", deadline_s=WAIT_S)
        finished = await asyncio.wait_for(self.reports.files.get(), WAIT_S)
        assert (finished.epoch, finished.slot) == (epoch, 0)
        chunks = [chunk async for chunk in self.bus.get_object(VIDEO_FILES, finished.file.object_name)]
        return b"".join(chunks)


@contextlib.asynccontextmanager
async def scheduler(workers: Workers) -> AsyncIterator[PlayedScheduler]:
    async with await NatsBus.connect(workers.url, name="scheduler") as bus:
        await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
        tensors = await UcxTensors.open(owner="scheduler")
        # Epochs above those of every test before: the workers live on between tests.
        played = PlayedScheduler(bus, tensors, int(time.time() * 1000))
        reports = played.reports

        subscriptions = [
            await bus.serve(DENOISING_FINISHED, heard_once(reports.latents)),
            await bus.serve(DECODING_FINISHED, heard_once(reports.files)),
            await bus.serve(PHASE_FAILED, heard_once(reports.failures)),
            await bus.subscribe(STEP_FINISHED, reports.steps.put_nowait),
        ]
        try:
            await everybody_ready(bus)
            yield played
        finally:
            for subscription in subscriptions:
                await subscription.stop()
            await tensors.close()


async def everybody_ready(bus: NatsBus) -> None:
    ready: set[str] = set()
    changed = asyncio.Event()

    def heard(change: object) -> None:
        if isinstance(change, MemberJoined):
            ready.add(change.member.instance)
            changed.set()

    async with MembershipView(bus, 20.0, heard).running(), asyncio.timeout(WAIT_S):
        while not {"encoder-0", "dit-0", "vae-0"} <= ready:
            changed.clear()
            await changed.wait()


def in_process(pipeline: OpenSoraPipeline, asked: VideoRequest) -> GeneratedVideo:
    return pipeline.generate(
        asked.prompt,
        asked.seed,
        steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        negative_prompt=asked.negative_prompt,
        frames=asked.frames,
        width=asked.width,
        height=asked.height,
        fps=asked.fps,
    )


def mp4(asked: VideoRequest, frames: np.ndarray) -> bytes:
    file = Mp4Encoder(asked.width, asked.height, asked.fps)
    file.add(frames)
    return file.finish()


@pytest.mark.parametrize(
    "changes",
    [{}, {"negative_prompt": "a blue square"}, {"width": 48, "seed": 8}, {"frames": 1}, {"guidance_scale": 1.0}],
    ids=["plain", "negative prompt", "another size", "one frame", "no guidance"],
)
async def test_a_served_video_equals_the_same_phases_in_one_process(
    workers: Workers, pipeline: OpenSoraPipeline, changes: dict[str, object]
) -> None:
    asked = request(**changes)
    expected = in_process(pipeline, asked)
    async with scheduler(workers) as played:
        finished = await played.denoised(asked)
        latent = await played.fetched(finished.latent)
        torch.testing.assert_close(latent, expected.latent, atol=1e-5, rtol=0.0)
        file = await played.decoded(asked, latent, finished.epoch)
        assert file == mp4(asked, expected.frames)
        steps = [await asyncio.wait_for(played.reports.steps.get(), WAIT_S) for _ in range(STEPS)]
        assert played.reports.steps.empty()
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert all(step.degree_of_parallelism == 1 and step.started_at_s <= step.ended_at_s for step in steps)


async def test_prompts_encoded_together_equal_those_encoded_alone(workers: Workers, pipeline: OpenSoraPipeline) -> None:
    prompts = ["a red circle", "a blue square moves up", "a red circle", "left right up down"]
    async with scheduler(workers) as played:
        encoded = await asyncio.gather(*(played.encode(request(prompt=prompt)) for prompt in prompts))
        embeddings = [await played.fetched(each.text) for each in encoded]
    for prompt, served in zip(prompts, embeddings, strict=True):
        assert torch.equal(served, pipeline.encoder.encode([prompt])[0])


async def test_a_prompt_too_long_is_refused_with_its_length(workers: Workers) -> None:
    async with scheduler(workers) as played:
        with pytest.raises(RemoteFailure) as refused:
            await played.encode(request(prompt="a " * 12))
        assert refused.value.failure.code == "prompt_too_long"
        assert "13 tokens" in refused.value.failure.message and "at most 12" in refused.value.failure.message
        assert not refused.value.failure.retryable
        with pytest.raises(RemoteFailure) as refused:
            await played.encode(request(negative_prompt="a " * 12))
        assert refused.value.failure.code == "negative_prompt_too_long"


async def test_revoking_ends_the_work_at_the_next_step_and_the_next_lease_starts(workers: Workers) -> None:
    async with scheduler(workers) as played:
        asked = request(steps=2000)
        lease = played.lease(asked, await played.encode(asked))
        await played.grant(lease)
        first = await asyncio.wait_for(played.reports.steps.get(), WAIT_S)
        assert first.epoch == lease.epoch
        revoke = RevokeLease(job_id="job", epoch=lease.epoch)
        await played.bus.request(REVOKE_LEASE, revoke, "dit-0", deadline_s=WAIT_S)
        revoked_s = time.time()
        finished = await played.denoised(request())
        assert finished.epoch > lease.epoch
        await played.fetched(finished.latent)
        steps = [played.reports.steps.get_nowait() for _ in range(played.reports.steps.qsize())]
        # At most the step under way when the revocation came: reports of those before it may be heard after its answer.
        assert sum(step.epoch == lease.epoch and step.ended_at_s > revoked_s for step in steps) <= 1
        assert played.reports.failures.empty()


async def test_a_newer_lease_overtakes_and_an_older_one_is_refused(workers: Workers) -> None:
    async with scheduler(workers) as played:
        long = request(steps=2000)
        older = played.lease(long, await played.encode(long), job_id="older")
        newer = played.lease(request(), await played.encode(request()), job_id="newer")
        await played.grant(older)
        await asyncio.wait_for(played.reports.steps.get(), WAIT_S)
        await played.grant(newer)
        finished = await asyncio.wait_for(played.reports.latents.get(), WAIT_S)
        assert finished.job_id == "newer"
        await played.fetched(finished.latent)
        with pytest.raises(RemoteFailure) as refused:
            await played.grant(older)
        assert refused.value.failure.code == "stale_epoch"


async def test_embeddings_that_are_gone_are_a_failure_that_may_pass(workers: Workers) -> None:
    async with scheduler(workers) as played:
        encoded = await played.encode(request())
        await played.fetched(encoded.text)
        # Who asks again has the owner count the first time before that.
        with pytest.raises(TensorUnknown):
            await played.fetched(encoded.text)
        lease = played.lease(request(), encoded)
        await played.grant(lease)
        failed = await asyncio.wait_for(played.reports.failures.get(), WAIT_S)
        assert (failed.epoch, failed.failure.code) == (lease.epoch, "tensor_not_fetched")
        assert failed.failure.retryable


async def test_what_is_granted_twice_is_done_once(workers: Workers) -> None:
    """The scheduler asks again where a broker has lost the answer, at whatever time."""
    async with scheduler(workers) as played:
        asked = request()
        lease = played.lease(asked, await played.encode(asked))
        await played.grant(lease)
        await played.grant(lease)
        finished = await asyncio.wait_for(played.reports.latents.get(), WAIT_S)
        await played.grant(lease)
        latent = await played.fetched(finished.latent)
        ref = played.tensors.export(latent, uses=1, lease_s=WAIT_S)
        epoch = finished.epoch
        work = DecodeVideo(job_id="job", epoch=epoch, request=asked, latent=ref, object_name=f"job/{epoch}.mp4")
        await played.bus.request(DECODE_VIDEO, work, "vae-0", deadline_s=WAIT_S)
        await played.bus.request(DECODE_VIDEO, work, "vae-0", deadline_s=WAIT_S)
        await asyncio.wait_for(played.reports.files.get(), WAIT_S)
        await played.bus.request(DECODE_VIDEO, work, "vae-0", deadline_s=WAIT_S)
        following = await played.denoised(asked)
        assert following.epoch > finished.epoch
        await played.decoded(asked, await played.fetched(following.latent), following.epoch)
        await eventually(lambda: played.reports.steps.qsize() >= 2 * STEPS)
        assert played.reports.steps.qsize() == 2 * STEPS
        assert played.reports.latents.empty() and played.reports.files.empty() and played.reports.failures.empty()


async def test_a_latent_of_the_wrong_shape_is_a_final_failure(workers: Workers) -> None:
    async with scheduler(workers) as played:
        ref = played.tensors.export(torch.zeros(1, 4, 1, 2, 2))
        epoch = int(time.time() * 1000) + 10
        work = DecodeVideo(job_id="job", epoch=epoch, request=request(), latent=ref, object_name="job/x.mp4")
        await played.bus.request(DECODE_VIDEO, work, "vae-0", deadline_s=WAIT_S)
        failed = await asyncio.wait_for(played.reports.failures.get(), WAIT_S)
        assert (failed.failure.code, failed.failure.retryable) == ("decoding_failed", False)


async def test_a_terminated_worker_finishes_its_lease_and_leaves(workers: Workers, model: Path, tmp_path: Path) -> None:
    async with scheduler(workers) as played:
        lease = played.lease(request(steps=40), await played.encode(request()))
        await played.grant(lease)
        await asyncio.wait_for(played.reports.steps.get(), WAIT_S)
        process = workers.processes["dit-0"]
        process.send_signal(signal.SIGTERM)
        finished = await asyncio.wait_for(played.reports.latents.get(), WAIT_S)
        assert finished.epoch == lease.epoch
        assert process.poll() is None
        await played.fetched(finished.latent)
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0
        workers.start("dit")


async def test_a_model_that_is_not_there_ends_the_worker_with_one_line(workers: Workers, tmp_path: Path) -> None:
    environment = os.environ | {"TRIPTYCH_NATS_URL": workers.url, "TRIPTYCH_VIDEO_MODEL": str(tmp_path / "nowhere")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.vae", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 2
    lines = errors.decode().strip().splitlines()
    assert len(lines) == 1 and "nowhere" in lines[0] and "model_index.json" in lines[0]
