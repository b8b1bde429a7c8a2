"""The encoder process: prompts in, text embeddings out, kept here until their DiT worker fetches them."""

import asyncio
import contextlib
import time
from collections.abc import Sequence

import structlog
import torch

from common.bus.errors import Refusal
from common.bus.port import Subscription
from common.messages.cluster import Service
from common.messages.failures import Failure, Stage
from common.messages.subjects import ENCODE_PROMPT
from common.messages.tensors import TensorRef
from common.messages.video import EncodePrompt, PromptEncoded
from common.models.opensora.pipeline import PromptEncoder
from common.runtime.worker import Equipment, serve_worker
from services.encoder.batcher import PromptBatcher
from services.encoder.config import EncoderSettings

log = structlog.get_logger()

# Who was granted a lease fetches its embeddings at once; what lies here longer belongs to no job that starts soon.
FETCHED_WITHIN_S = 1.0


class EncoderWorker:
    """Answers ``EncodePrompt``."""

    def __init__(self, equipment: Equipment, encoder: PromptEncoder, settings: EncoderSettings) -> None:
        self._instance = equipment.instance
        self._bus = equipment.bus
        self._tensors = equipment.tensors
        self._compute = equipment.compute
        self._encoder = encoder
        self._lease_s = settings.text_lease_s
        self._batcher = PromptBatcher(self._encode, encoder.max_batch, settings.remembered_prompts)

    async def listen(self) -> Sequence[Subscription]:
        return (await self._bus.serve(ENCODE_PROMPT, self._answer, self._instance),)

    async def run(self) -> None:
        await self._batcher.run()

    async def finish(self) -> None:
        """Nothing waits to be encoded, and what was encoded has been fetched by whoever starts with it now."""
        # Looked at, not waited for: this happens once in a process's life, and the ports promise no event for it.
        while not self._batcher.idle:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FETCHED_WITHIN_S):
                while self._tensors.exported_count:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    async def _answer(self, request: EncodePrompt) -> PromptEncoded:
        self._refuse_too_long("prompt", request.prompt)
        self._refuse_too_long("negative_prompt", request.negative_prompt)
        started_at_s = time.time()
        prompts = [request.prompt, *([request.negative_prompt] if request.negative_prompt else [])]
        refs = [self._export(tensor) for tensor in await asyncio.gather(*map(self._batcher.encoded, prompts))]
        return PromptEncoded(
            job_id=request.job_id,
            text=refs[0],
            negative=refs[1] if len(refs) > 1 else None,
            started_at_s=started_at_s,
            ended_at_s=time.time(),
        )

    async def _encode(self, prompts: list[str]) -> Sequence[torch.Tensor]:
        return await self._compute.run(self._encoder.encode, prompts)

    def _export(self, tensor: torch.Tensor) -> TensorRef:
        return self._tensors.export(tensor, uses=1, lease_s=self._lease_s)

    def _refuse_too_long(self, field: str, prompt: str) -> None:
        tokens, limit = self._encoder.token_count(prompt), self._encoder.max_tokens
        if tokens > limit:
            message = f"{field} has {tokens} tokens, this model takes at most {limit}: shorten it"
            raise Refusal(Failure(stage=Stage.ENCODER, code=f"{field}_too_long", message=message))


async def serve(settings: EncoderSettings, stop: asyncio.Event) -> None:
    def make(equipment: Equipment, encoder: PromptEncoder) -> EncoderWorker:
        return EncoderWorker(equipment, encoder, settings)

    await serve_worker(settings, stop, Service.ENCODER, PromptEncoder, make)
