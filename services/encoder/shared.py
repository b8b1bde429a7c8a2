"""Embeddings in the cache stores, so that an encoder that starts anew, or another one, does not make them again.

Only where that pays: a fetch is two messages and a copy, so for a small text encoder it costs more than encoding.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence

import structlog
import torch

from common.bus.errors import BusError
from common.bus.port import Bus
from common.messages.cache import FindTensor, StoreTensor
from common.messages.subjects import FIND_TENSOR, STORE_TENSOR
from common.tensors.errors import TensorError
from common.tensors.port import Tensors

log = structlog.get_logger()

# Encoding is the remedy, so this is not worth a long wait.
FIND_DEADLINE_S = 0.5
STORE_DEADLINE_S = 2.0
MOST_WAITING = 256
# Beside the wait, a fetch takes time of the cache store and the broker.
WORTH = 2.0
# Until one was measured: what a fetch took on one machine, over shared memory.
FETCH_S = 0.003


class SharedPrompts:
    """What other encoders of the same model have made, and the other way round. ``run`` puts there what is offered.

    Args:
        identity: of the model, down to the bits that it makes.
        encode_s: what encoding one prompt takes, in seconds.
        always: whether to share whatever that costs.
    """

    def __init__(self, bus: Bus, tensors: Tensors, identity: str, encode_s: float, always: bool = False) -> None:
        self._bus = bus
        self._tensors = tensors
        self._identity = identity
        self._encode_s = encode_s
        self._always = always
        self._fetch_s: float | None = None
        self._offered: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._wake = asyncio.Event()

    @property
    def pays(self) -> bool:
        """Whether a fetch is worth its while, by the quickest one so far: what disturbs one is not its own cost."""
        return self._always or self._encode_s > WORTH * (self._fetch_s or FETCH_S)

    async def find(self, prompts: Sequence[str]) -> list[torch.Tensor | None]:
        """For each prompt its embeddings [tokens, channels], or None: not there, or not there in time."""
        if not self.pays:
            return [None] * len(prompts)
        return list(await asyncio.gather(*(self._find(prompt) for prompt in prompts)))

    def offer(self, prompt: str, embeddings: torch.Tensor) -> None:
        """Have it put there soon; of too many that wait, the oldest are left out."""
        if not self.pays:
            return
        self._offered[prompt] = embeddings
        if len(self._offered) > MOST_WAITING:
            self._offered.popitem(last=False)
        self._wake.set()

    async def run(self) -> None:
        """Put there what is offered, one after the other; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._offered:
                await self._store(*self._offered.popitem(last=False))

    async def _find(self, prompt: str) -> torch.Tensor | None:
        started_s = time.monotonic()
        try:
            found = await self._bus.request(FIND_TENSOR, FindTensor(key=self._key(prompt)), deadline_s=FIND_DEADLINE_S)
            if found.tensor is None:
                return None
            embeddings = await self._tensors.fetch(found.tensor, deadline_s=FIND_DEADLINE_S)
        except (BusError, TensorError) as error:
            log.info("embeddings not fetched", reason=str(error))
            return None
        taken_s = time.monotonic() - started_s
        self._fetch_s = min(taken_s, self._fetch_s or taken_s)
        return embeddings

    async def _store(self, prompt: str, embeddings: torch.Tensor) -> None:
        # Torch shares memory within a batch, the transport wants it dense: on the CPU, as the cache store has it.
        tensor = embeddings.to("cpu").contiguous()
        ref = self._tensors.export(tensor, uses=1, lease_s=2 * STORE_DEADLINE_S)
        try:
            request = StoreTensor(key=self._key(prompt), tensor_version=0, tensor=ref)
            await self._bus.request(STORE_TENSOR, request, deadline_s=STORE_DEADLINE_S)
        except BusError as error:
            log.info("embeddings not stored", reason=str(error))
        finally:
            await self._tensors.release(ref)

    def _key(self, prompt: str) -> str:
        return f"text/{self._identity}/{hashlib.sha256(prompt.encode()).hexdigest()}"
