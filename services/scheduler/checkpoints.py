"""What the scheduler asks the cache store: how far a job has come, and to forget it.

Checkpoints save work, they decide nothing: a cache store that is away, slow or empty means that a job begins again.
"""

import asyncio
from collections.abc import Callable

import structlog

from common.bus.errors import BusError, BusUnavailable, DeadlineExceeded, NobodyThere
from common.bus.port import Bus
from common.messages.cache import DropTensor, FindTensor, TensorFound
from common.messages.subjects import DROP_TENSOR, FIND_TENSOR
from common.messages.video import Checkpoint, checkpoint_key

log = structlog.get_logger()

FIND_DEADLINE_S = 1.0
# Only the version, which lies in memory; a starting scheduler asks for one job after the other.
STEP_DEADLINE_S = 0.5
# A cache store that died together with a worker is back before this, on a busy machine too; what it has on disk is
# worth the wait.
RESTART_S = 10.0
_RETRY_S = 0.05
DROP_DEADLINE_S = 2.0


class Checkpoints:
    """The newest checkpoint of each job.

    Args:
        bus: where the cache store is asked.
        expected: whether a cache store belongs to the cluster now, be it between two lives.
    """

    def __init__(self, bus: Bus, expected: Callable[[], bool]) -> None:
        self._bus = bus
        self._expected = expected

    async def newest(self, job_id: str) -> Checkpoint | None:
        """The job's newest checkpoint, its latent exported for one fetch."""
        try:
            async with asyncio.timeout(RESTART_S):
                found = await self._find_once_there(FindTensor(key=checkpoint_key(job_id)))
        except (BusError, TimeoutError) as error:
            log.warning("no checkpoint found", job=job_id, reason=str(error) or "no answer")
            return None
        if not found.tensor_version or found.tensor is None:
            return None
        return Checkpoint(step=found.tensor_version, latent=found.tensor)

    async def newest_step(self, job_id: str) -> int:
        """After how many steps that was; 0 without one."""
        try:
            request = FindTensor(key=checkpoint_key(job_id), uses=0)
            return (await self._find(request, STEP_DEADLINE_S)).tensor_version or 0
        except BusError as error:
            log.info("not known how far a job has come", job=job_id, reason=str(error))
            return 0

    async def drop(self, job_id: str) -> None:
        """The job has ended. What cannot be told to the cache store now, it evicts in time."""
        request = DropTensor(key=checkpoint_key(job_id))
        for last in (False, True):
            try:
                await self._bus.request(DROP_TENSOR, request, deadline_s=DROP_DEADLINE_S)
                return
            except NobodyThere:
                return
            except BusError as error:
                # A cache store that died while it was asked never answers; the next one asked may be another.
                if last:
                    log.warning("checkpoint not dropped", job=job_id, reason=str(error))

    async def _find_once_there(self, request: FindTensor) -> TensorFound:
        while True:
            try:
                return await self._find(request, FIND_DEADLINE_S)
            except BusUnavailable:
                log.info("no broker, asking for the checkpoint again", key=request.key)
            except (NobodyThere, DeadlineExceeded):
                if not self._expected():
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _find(self, request: FindTensor, deadline_s: float) -> TensorFound:
        return await self._bus.request(FIND_TENSOR, request, deadline_s=deadline_s)
