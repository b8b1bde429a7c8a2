"""What the scheduler asks the cache store: how far a job has come, and to forget it.

Checkpoints save work, they decide nothing: a cache store that is away, slow or empty means that a job begins again.
"""

import structlog

from common.bus.errors import BusError, NobodyThere
from common.bus.port import Bus
from common.messages.cache import DropTensor, FindTensor, TensorFound
from common.messages.subjects import DROP_TENSOR, FIND_TENSOR
from common.messages.video import Checkpoint, checkpoint_key

log = structlog.get_logger()

FIND_DEADLINE_S = 1.0
DROP_DEADLINE_S = 2.0


class Checkpoints:
    """The newest checkpoint of each job."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def newest(self, job_id: str) -> Checkpoint | None:
        """The job's newest checkpoint, its latent exported for one fetch."""
        found = await self._find(job_id, uses=1)
        if found is None or not found.tensor_version or found.tensor is None:
            return None
        return Checkpoint(step=found.tensor_version, latent=found.tensor)

    async def newest_step(self, job_id: str) -> int:
        """After how many steps that was; 0 without one."""
        found = await self._find(job_id, uses=0)
        return 0 if found is None else found.tensor_version or 0

    async def drop(self, job_id: str) -> None:
        """The job has ended. What cannot be told to the cache store now, it evicts in time."""
        try:
            await self._bus.request(DROP_TENSOR, DropTensor(key=checkpoint_key(job_id)), deadline_s=DROP_DEADLINE_S)
        except NobodyThere:
            return
        except BusError as error:
            log.warning("checkpoint not dropped", job=job_id, reason=str(error))

    async def _find(self, job_id: str, uses: int) -> TensorFound | None:
        request = FindTensor(key=checkpoint_key(job_id), uses=uses)
        try:
            return await self._bus.request(FIND_TENSOR, request, deadline_s=FIND_DEADLINE_S)
        except BusError as error:
            log.warning("no checkpoint found", job=job_id, reason=str(error))
            return None
