"""One measuring process: ``python -m compose.profiling.member``, with the environment of a DiT worker.

It says first what it works on, then answers each JSON line on its standard input with one on its standard output:
``{"do": name, ...}`` with ``{"seconds": [...], ...}`` or ``{"error": text}``. It measures what the workers do, by the
very code they do it with.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.models.memory import keep_freed_memory
from common.models.mp4 import Mp4Encoder
from common.models.opensora.errors import ModelLoadError
from common.models.opensora.parallel import Parallelism, ParallelSTDiT3, SequenceParallelism
from common.models.opensora.pipeline import Denoiser, FrameDecoder, PromptEncoder
from common.models.opensora.spec import load_spec
from common.parallel.errors import GroupBroken
from common.parallel.groups import Groups
from common.runtime.settings import SettingsError, WorkerSettings, load_settings
from common.runtime.worker import choose_device, choose_precision

Part = TypeVar("Part")

PROMPT = "a red circle moving right"
# Kinds of published size take minutes on a CPU.
_EXCHANGE_TIMEOUT_S = 600.0
_MEETING_TIMEOUT_S = 120.0


class Member:
    """Holds what a slot holds: a denoiser and a decoder; the encoder only while it is measured."""

    def __init__(self, settings: WorkerSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._name = settings.instance
        self._spec = load_spec(settings.video_model)
        self._device = choose_device(settings)
        self._dtype = choose_precision(settings, self._device)
        on_gpu = self._device.type == "cuda"
        self._groups = Groups(
            self._name,
            backend="nccl" if on_gpu else "gloo",
            device=self._device,
            exchange_timeout_s=_EXCHANGE_TIMEOUT_S,
            meeting_timeout_s=_MEETING_TIMEOUT_S,
        )
        self._denoiser: Denoiser | None = None
        self._decoder: FrameDecoder | None = None
        # The last latent that was denoised: what a decoder gets to see.
        self._latent: Tensor | None = None

    def about(self) -> dict[str, Any]:
        gpus = torch.cuda.device_count() if self._device.type == "cuda" else 0
        return {"gpus": gpus, "device": _device_name(self._device), "address": self._groups.address}

    def encode(self, repeats: int, warm_up: int, path: str) -> dict[str, Any]:
        """Encode one prompt; the embeddings go to ``path``, for all members."""
        encoder = PromptEncoder(self._spec, self._device, self._dtype)
        seconds = [self._timed(lambda: encoder.encode([PROMPT])) for _ in range(warm_up + repeats)]
        save_file({"text": encoder.encode([PROMPT])[0].cpu().clone()}, path)
        return {"seconds": seconds[warm_up:]}

    def load(self) -> dict[str, Any]:
        """Make denoiser and decoder ready."""
        self._denoiser = Denoiser(self._spec, self._device, self._dtype)
        self._decoder = FrameDecoder(self._spec, self._device, self._dtype)
        return {}

    def step(
        self,
        kind: tuple[int, int, int],
        repeats: int,
        warm_up: int,
        path: str,
        members: list[str],
        address: str,
        token: int,
        sequence: str,
        guidance_parallel: bool,
    ) -> dict[str, Any]:
        """Denoise a video of ``kind`` (width, height, frames) with the others, in so many steps."""
        width, height, frames = kind
        denoiser = _ready(self._denoiser)
        group = self._groups.enter(members, address, token)
        parallelism = Parallelism(SequenceParallelism(sequence), guidance_parallel)
        transformer = ParallelSTDiT3(denoiser.model).on(group, parallelism)
        run = denoiser.start(
            load_file(path)["text"].to(self._device),
            None,
            width=width,
            height=height,
            frames=frames,
            fps=self._spec.defaults.fps,
            steps=warm_up + repeats,
            guidance_scale=self._spec.defaults.guidance_scale,
            seed=1,
        )

        def take() -> None:
            # Before each step the leader says that there is one.
            group.agree(0)
            run.step(transformer)

        seconds = [self._timed(take) for _ in range(warm_up + repeats)]
        self._latent = run.latent
        return {"seconds": seconds[warm_up:], "tokens": _tokens(denoiser, run.latent)}

    def decode(self, kind: tuple[int, int, int], repeats: int, warm_up: int) -> dict[str, Any]:
        """Make the file of the last latent."""
        width, height, frames = kind
        decoder, latent = _ready(self._decoder), _ready(self._latent)

        def work() -> bytes:
            return make_file(decoder, latent, frames, height, width, self._spec.defaults.fps)

        return {"seconds": [self._timed(work) for _ in range(warm_up + repeats)][warm_up:]}

    def _timed(self, work: Callable[[], object]) -> float:
        self._settle()
        started_s = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - started_s

    def _settle(self) -> None:
        """A GPU's work is done, not only queued."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _ready(part: Part | None) -> Part:
    if part is None:
        raise RuntimeError("nothing is loaded yet")
    return part


def make_file(decoder: FrameDecoder, latent: Tensor, frames: int, height: int, width: int, fps: int) -> bytes:
    """The MP4 of a latent as a VAE worker makes it: while a chunk is decoded, the one before it is compressed."""
    file = Mp4Encoder(width, height, fps)
    compressing: Future[None] | None = None
    with ThreadPoolExecutor(1) as filing:
        for chunk in decoder.decode(latent, frames, height, width):
            if compressing is not None:
                compressing.result()
            compressing = filing.submit(file.add, chunk)
        if compressing is not None:
            compressing.result()
        return file.finish()


def _tokens(denoiser: Denoiser, latent: Tensor) -> int:
    patches = zip(latent.shape[2:], denoiser.model.config.patch_size, strict=True)
    return math.prod(-(-side // patch) for side, patch in patches)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def main() -> None:
    """Answer until standard input closes."""
    keep_freed_memory()
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        member = Member(load_settings(WorkerSettings))
    except (ModelLoadError, SettingsError, OSError, RuntimeError) as error:
        say({"error": str(error)})
        return
    say(member.about())
    works: dict[str, Callable[..., dict[str, Any]]] = {
        "encode": member.encode,
        "load": member.load,
        "step": member.step,
        "decode": member.decode,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(works[request.pop("do")](**request))
        except (ModelLoadError, GroupBroken, OSError, RuntimeError, ValueError) as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
