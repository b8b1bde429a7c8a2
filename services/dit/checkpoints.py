"""Step checkpoints: the latent goes to the cache store in the background; a job that loses its worker goes on from it.

The latent and the count of steps are all there is to keep: the sampler's state is a function of the request (see
``common.messages.video.Checkpoint``).
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch

from common.bus.errors import BusError, BusUnavailable, DeadlineExceeded, RemoteFailure
from common.bus.port import Bus
from common.messages.cache import StoreTensor, TensorStored
from common.messages.subjects import CHECKPOINT_STORED, STORE_TENSOR
from common.messages.video import CheckpointStored, checkpoint_key
from common.models.opensora.pipeline import DenoisingRun
from common.tensors.errors import TensorError
from common.tensors.port import Tensors
from services.dit.interval import CheckpointInterval

log = structlog.get_logger()

# A store that was killed while asked never answers, and until it is given up no newer latent is kept: so not for long.
STORE_DEADLINE_S = 1.0
# What a parked job has come to is asked to be kept for so long, as nothing else keeps it.
KEEP_WITHIN_S = 10.0
# Between two such askings: a bus that is away says so at once.
KEEP_PAUSE_S = 0.2
# After so long, or five times what the last store took, it is asked once more: another one, if that one has died.
FIRST_STORE_DEADLINE_S = 0.05
# So many cache stores have a checkpoint that is said to be stored, or all that are in reach.
COPIES = 2
STORE_BYTES_PER_S = 50e6
# A leader whose next checkpoint is due waits so long at most for the one before it to lie in the cache store.
CATCH_UP_S = 2.0
# A job that waits for a worker longer than this may have to begin again.
PIN_S = 3600.0
# The job at work, and the one before it, whose final latent may not have gone yet.
_MAX_JOBS_WAITING = 2


@dataclass(frozen=True)
class Snapshot:
    """A latent on the CPU that nobody writes to any more."""

    job_id: str
    epoch: int
    step: int
    latent: torch.Tensor


def take_step(
    run: DenoisingRun, interval: CheckpointInterval, transformer: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor | None:
    """Take the next step; the latent's copy where it is to be kept, which the final one always is.

    ``transformer``: the model on a group, where it is not this worker's alone.
    """
    started_s = time.perf_counter()
    run.step(transformer)
    # The step is over when the device is: kernels queued ahead would outrun revocations and reports.
    _wait_for(run.latent)
    due = interval.step_took(time.perf_counter() - started_s)
    return copied(run.latent) if due or run.finished else None


def copied(latent: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU: the transport shares what it is given, and needs it contiguous."""
    return latent.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def copy_cost_s(latent: torch.Tensor) -> float:
    """What a copy takes, in seconds: the best of three, since whatever disturbs one is not the copy's own cost."""
    _wait_for(latent)
    costs_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        copied(latent)
        costs_s.append(time.perf_counter() - started_s)
    return min(costs_s)


def _wait_for(latent: torch.Tensor) -> None:
    if latent.device.type == "cuda":
        torch.cuda.current_stream(latent.device).synchronize()


class CheckpointWriter:
    """Brings snapshots to the cache store: one at a time, of each job the newest.

    A store takes less than the K steps to the next one, so that nothing waits. While the cache store is away or slow,
    snapshots replace each other here; a store that fails costs a log line. ``store_s``: what the last one took;
    ``least_store_s``: the quickest one, since whatever disturbs one is not its own cost. Both are 0 before the first.
    """

    def __init__(self, bus: Bus, tensors: Tensors) -> None:
        self._bus = bus
        self._tensors = tensors
        self._waiting: OrderedDict[str, Snapshot] = OrderedDict()
        self._offered = asyncio.Event()
        self._failing = False
        self.store_s = 0.0
        self.least_store_s = 0.0
        self.idle = asyncio.Event()
        self.idle.set()

    def offer(self, snapshot: Snapshot) -> None:
        """Have it stored soon, unless a newer one of its job comes before its turn."""
        self._waiting.pop(snapshot.job_id, None)
        self._waiting[snapshot.job_id] = snapshot
        if len(self._waiting) > _MAX_JOBS_WAITING:
            self._waiting.popitem(last=False)
        self.idle.clear()
        self._offered.set()

    async def caught_up(self) -> None:
        """Wait until what was offered lies in the cache store: so a death costs K steps, and not those under way too.

        Not for long, and not at all where stores fail.
        """
        if self._failing:
            return
        try:
            # ``wait_for`` forgets, before Python 3.12, a cancellation that comes together with the event.
            async with asyncio.timeout(CATCH_UP_S):
                await self.idle.wait()
        except TimeoutError:
            self._failing = True
            log.warning("the cache store is slow, checkpoints may come late", seconds=CATCH_UP_S)

    async def run(self) -> None:
        """Store one after the other; runs until cancelled."""
        while True:
            await self._offered.wait()
            self._offered.clear()
            while self._waiting:
                _, snapshot = self._waiting.popitem(last=False)
                await self._store(snapshot)
            self.idle.set()

    async def keep(self, snapshot: Snapshot) -> None:
        """Store it now; returns once it lies there. Nothing newer comes, so one that is slow is waited for.

        Raises:
            BusError: the cache store is full or nobody is there, or there was no answer within ``KEEP_WITHIN_S``.
        """
        self._waiting.pop(snapshot.job_id, None)
        ends_s = time.monotonic() + KEEP_WITHIN_S
        while True:
            try:
                await self._ask(snapshot)
                return
            except (BusUnavailable, DeadlineExceeded):
                if time.monotonic() >= ends_s:
                    raise
            await asyncio.sleep(KEEP_PAUSE_S)

    async def _store(self, snapshot: Snapshot) -> None:
        started_s = time.monotonic()
        try:
            answer = await self._ask(snapshot)
            self.store_s = time.monotonic() - started_s
            self.least_store_s = min(self.store_s, self.least_store_s or self.store_s)
            if answer.tensor_version == snapshot.step:
                stored = CheckpointStored(
                    job_id=snapshot.job_id, epoch=snapshot.epoch, step=snapshot.step, copies=answer.copies
                )
                await self._bus.publish(CHECKPOINT_STORED, stored, snapshot.job_id)
        except (BusError, TensorError) as error:
            if not self._failing:
                log.warning("checkpoint not stored", job=snapshot.job_id, step=snapshot.step, reason=str(error))
            self._failing = True
        else:
            if self._failing:
                log.info("checkpoints are stored again", job=snapshot.job_id, step=snapshot.step)
            self._failing = False

    async def _ask(self, snapshot: Snapshot) -> TensorStored:
        try:
            return await self._ask_once(snapshot, min(STORE_DEADLINE_S, max(FIRST_STORE_DEADLINE_S, 5 * self.store_s)))
        except (BusUnavailable, DeadlineExceeded, RemoteFailure) as error:
            log.info("storing once more", job=snapshot.job_id, step=snapshot.step, reason=str(error))
            return await self._ask_once(snapshot, STORE_DEADLINE_S)

    async def _ask_once(self, snapshot: Snapshot, deadline_s: float) -> TensorStored:
        deadline_s += snapshot.latent.nbytes / STORE_BYTES_PER_S
        ref = self._tensors.export(snapshot.latent, uses=1, lease_s=2 * deadline_s)
        request = StoreTensor(
            key=checkpoint_key(snapshot.job_id),
            tensor_version=snapshot.step,
            tensor=ref,
            pin_s=PIN_S,
            copies=COPIES,
        )
        try:
            return await self._bus.request(STORE_TENSOR, request, deadline_s=deadline_s)
        finally:
            # Where it was not fetched; else it is gone already.
            await self._tensors.release(ref)
