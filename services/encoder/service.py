"""The encoder process: prompts in, text embeddings out, kept here until their DiT worker fetches them."""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Sequence

import structlog
import torch

from common.bus.errors import Refusal
from common.bus.port import Subscription
from common.messages.cluster import Service
from common.messages.failures import Failure, Stage
from common.messages.subjects import ENCODE_PROMPT, PROMPTS_SERVED
from common.messages.tensors import TensorRef
from common.messages.video import EncodePrompt, PromptEncoded, PromptSource, PromptsServed
from common.models.opensora.pipeline import PromptEncoder
from common.runtime.worker import Equipment, serve_worker
from services.encoder.batcher import PromptBatcher
from services.encoder.config import EncoderSettings
from services.encoder.shared import SharedPrompts

log = structlog.get_logger()

_PROBE = "a red circle moves left while a blue square, which is a little larger, turns slowly"
_PROBES = 3
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
        self._share = settings.share_prompts
        self._shared: SharedPrompts | None = None
        self._lease_s = settings.text_lease_s
        self._batcher = PromptBatcher(self._encode, encoder.max_batch, settings.remembered_prompts)

    async def listen(self) -> Sequence[Subscription]:
        if self._share != "never":
            self._shared = await self._share_prompts()
        return (await self._bus.serve(ENCODE_PROMPT, self._answer, self._instance),)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._batcher.run(), name="batches")
            if self._shared is not None:
                tasks.create_task(self._shared.run(), name="shared")

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
        await self._count(PromptSource.MEMORY, sum(map(self._batcher.remembers, prompts)))
        refs = [self._export(tensor) for tensor in await asyncio.gather(*map(self._batcher.encoded, prompts))]
        return PromptEncoded(
            job_id=request.job_id,
            text=refs[0],
            negative=refs[1] if len(refs) > 1 else None,
            started_at_s=started_at_s,
            ended_at_s=time.time(),
        )

    async def _share_prompts(self) -> SharedPrompts:
        """Get to know this model: what it makes of a sentence tells it from any other, and so does the time it takes.

        Encoders that make other bits of it, on another device or with another version of a library, share nothing.
        """
        sentence = _PROBE
        while self._encoder.token_count(sentence) > self._encoder.max_tokens:
            sentence = sentence.rpartition(" ")[0]
        encode_s = math.inf
        for _ in range(_PROBES):
            started_s = time.monotonic()
            (probe,) = await self._compute.run(self._encoder.encode, [sentence])
            # The quickest: what disturbs one is not its own cost, and the first one warms the model up.
            encode_s = min(encode_s, time.monotonic() - started_s)
        identity = hashlib.sha256(probe.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
        shared = SharedPrompts(self._bus, self._tensors, identity, encode_s, self._share == "always")
        log.info("embeddings are shared", identity=identity, encode_s=round(encode_s, 4), pays=shared.pays)
        return shared

    async def _encode(self, prompts: list[str]) -> Sequence[torch.Tensor]:
        if self._shared is None:
            found: list[torch.Tensor | None] = [None] * len(prompts)
        else:
            found = await self._shared.find(prompts)
        missing = [prompt for prompt, embeddings in zip(prompts, found, strict=True) if embeddings is None]
        made = iter(await self._compute.run(self._encoder.encode, missing) if missing else ())
        embeddings = [known if known is not None else next(made) for known in found]
        if self._shared is not None:
            for prompt, known, one in zip(prompts, found, embeddings, strict=True):
                if known is None:
                    self._shared.offer(prompt, one)
        await self._count(PromptSource.CACHE_STORE, len(prompts) - len(missing))
        await self._count(PromptSource.MODEL, len(missing))
        return embeddings

    async def _count(self, source: PromptSource, prompts: int) -> None:
        if prompts:
            await self._bus.publish(PROMPTS_SERVED, PromptsServed(source=source, prompts=prompts), self._instance)

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
