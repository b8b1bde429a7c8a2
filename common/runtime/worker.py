"""The life of a process that runs one part of a model: connect, load, join the cluster, work, drain, leave."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import structlog
import torch

from common.bus.nats_bus import NatsBus
from common.bus.port import Bus, Subscription
from common.messages.cluster import Ping, Service, VideoModelInfo
from common.messages.failures import Acknowledged
from common.messages.subjects import PING
from common.models.memory import keep_freed_memory
from common.models.opensora.errors import ModelLoadError
from common.models.opensora.spec import VideoModelSpec, load_spec
from common.runtime.membership import Registration
from common.runtime.process import CannotServe
from common.runtime.settings import WorkerSettings
from common.tensors.port import Tensors
from common.tensors.ucx import UcxTensors

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")
Model = TypeVar("Model")


class ComputeThread:
    """One thread that runs the model, so that the event loop stays free to hear cancellations."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(threads,))

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``work`` there and wait for it. Work is done in the order it was asked for."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Take no more work; what is under way ends with the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Equipment:
    """What a worker works with."""

    instance: str
    slot: int | None
    device: torch.device
    bus: Bus
    tensors: Tensors
    compute: ComputeThread


class Worker(Protocol):
    """The body of a worker process."""

    async def listen(self) -> Sequence[Subscription]:
        """Start hearing requests."""

    async def run(self) -> None:
        """Work until cancelled."""

    async def finish(self) -> None:
        """Return once nothing is left to do."""


async def serve_worker(
    settings: WorkerSettings,
    stop: asyncio.Event,
    service: Service,
    load: Callable[[VideoModelSpec, torch.device, torch.dtype], Model],
    make: Callable[[Equipment, Model], Worker],
    meeting: str = "",
) -> None:
    """Load a part of the video model, join the cluster, work until ``stop``, finish what is under way.

    ``meeting`` is the address at which groups meet that this worker leads, where it can be in one.
    """
    keep_freed_memory()
    instance = settings.instance_of(service)
    device = choose_device(settings)
    dtype = choose_precision(settings, device)
    try:
        spec = load_spec(settings.video_model)
    except ModelLoadError as error:
        raise CannotServe(f"video model: {error}") from error
    bus = await NatsBus.connect(settings.nats_url, name=instance)
    compute = ComputeThread(service, settings.threads)
    tensors = await UcxTensors.open(owner=instance, device=device)
    try:
        async with Registration(bus, settings, service, str(device)) as registration:
            started_s = time.monotonic()
            try:
                model = await compute.run(load, spec, device, dtype)
            except ModelLoadError as error:
                raise CannotServe(f"video model: {error}") from error
            seconds = time.monotonic() - started_s
            log.info("model loaded", instance=instance, device=str(device), precision=str(dtype), seconds=seconds)
            worker = make(Equipment(instance, settings.slot, device, bus, tensors, compute), model)
            subscriptions = [*await worker.listen(), await bus.serve(PING, _answer, instance)]
            working = asyncio.create_task(worker.run(), name="work")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            await registration.ready(model_info(spec), meeting)
            # A worker whose loop has died must not look alive: whichever ends first ends the process.
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            await registration.draining()
            await _finish(worker, settings.drain_s)
            working.cancel()
            for subscription in subscriptions:
                await subscription.stop()
    finally:
        compute.close()
        await tensors.close()
        await bus.close()


async def _answer(_: Ping) -> Acknowledged:
    return Acknowledged()


async def _finish(worker: Worker, drain_s: float) -> None:
    try:
        async with asyncio.timeout(drain_s):
            await worker.finish()
    except TimeoutError:
        log.warning("drain time is over, leaving work behind", drain_s=drain_s)


def choose_device(settings: WorkerSettings) -> torch.device:
    """The slot's GPU where there is one, the CPU otherwise, or what the settings name."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda", (settings.slot or 0) % torch.cuda.device_count())
    return torch.device("cpu")


def choose_precision(settings: WorkerSettings, device: torch.device) -> torch.dtype:
    """What the settings name; otherwise float32 on a CPU, and on a GPU bfloat16, as the models were published."""
    if settings.precision != "auto":
        return torch.float32 if settings.precision == "float32" else torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def model_info(spec: VideoModelSpec) -> VideoModelInfo:
    """What the cluster tells about this model."""
    return VideoModelInfo(
        name=spec.name,
        sizes=spec.sizes,
        frames=spec.frames,
        fps=spec.fps_range,
        steps=spec.steps_range,
        guidance_scale=spec.guidance_range,
        max_prompt_tokens=spec.max_prompt_tokens,
        default_size=spec.defaults.size,
        default_frames=spec.defaults.frames,
        default_fps=spec.defaults.fps,
        default_steps=spec.defaults.steps,
        default_guidance_scale=spec.defaults.guidance_scale,
    )
