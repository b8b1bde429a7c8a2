"""The three phases of a video, one object each, and the three in a row.

A service holds one phase and calls exactly these methods, so a video made by the services and one made by
`OpenSoraPipeline` in a single process are the same by construction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.models.opensora.errors import ModelLoadError
from common.models.opensora.gpu.graphs import CapturedSTDiT3
from common.models.opensora.loading import fetch, load_stdit3, load_vae, read_vae_config
from common.models.opensora.rectified_flow import RectifiedFlow
from common.models.opensora.spec import VideoModelSpec
from common.models.opensora.stdit3 import PreparedText

# The frame rate by which the published model knows a still picture.
IMAGE_FPS = 120

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Conditioning:
    """What stays the same through all steps of one video.

    text: the prompt, then the negative or null prompt, as the transformer's blocks want them; fps: as the
    model is told; height, width: of the video, in pixels.
    """

    text: PreparedText
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class GeneratedVideo:
    """latent: float32 [1, C, t, h, w]; frames: uint8 [T, H, W, 3]."""

    latent: Tensor
    frames: Frames


class PromptEncoder:
    """The first phase: prompts to embeddings."""

    def __init__(self, spec: VideoModelSpec, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        # Here, not above: transformers takes seconds to import, and the other phases do not need it.
        from common.models.opensora.text import TextEncoder

        self.max_tokens = spec.max_prompt_tokens
        self.max_batch = TextEncoder.max_batch
        self._encoder = TextEncoder(spec.text_encoder, spec.max_prompt_tokens, device, dtype)

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt; `max_tokens` is the limit."""
        return self._encoder.token_count(prompt)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """float32 [tokens, C] for each prompt. Raises PromptTooLongError."""
        return self._encoder.encode_each(prompts)


class Denoiser:
    """The second phase: noise to latent, one step at a time."""

    def __init__(self, spec: VideoModelSpec, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.flow = RectifiedFlow(**asdict(spec.flow))
        self.model = load_stdit3(spec.transformer, self.device, dtype)
        self._captured = CapturedSTDiT3(self.model) if self.device.type == "cuda" else None
        self._vae_config = read_vae_config(fetch(spec.vae, config_only=True))
        longest = self.model.config.model_max_length
        if spec.max_prompt_tokens > longest:
            raise ModelLoadError(
                f"{spec.name}: max_prompt_tokens is {spec.max_prompt_tokens}, the transformer reads at most {longest}"
            )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """(1, C, t, h, w) of a video of that size in frames and pixels."""
        return 1, self.model.config.in_channels, *self._vae_config.latent_size(frames, height, width)

    def initial_latent(self, seed: int, frames: int, height: int, width: int) -> Tensor:
        """The noise a video starts from: drawn on the CPU, so a seed means the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = self.latent_shape(frames, height, width)
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(self.device)

    def timesteps(self, steps: int, frames: int, height: int, width: int) -> tuple[float, ...]:
        """The schedule of a video, a function of these numbers alone."""
        return self.flow.timesteps(steps, height, width, frames)

    @torch.no_grad()
    def prepare(
        self, text: Tensor, negative: Tensor | None, frames: int, height: int, width: int, fps: float
    ) -> Conditioning:
        """Make ready what all steps share, from encoded prompts [tokens, C].

        Without a negative prompt the model's null caption takes its place, as published with as many tokens as
        the prompt has.
        """
        null = self.model.null_embedding(length=text.shape[0])[0, 0] if negative is None else negative
        rows = [text.to(self.device), null.to(self.device)]
        longest = max(row.shape[0] for row in rows)
        limit = self.model.config.model_max_length
        if longest > limit:
            raise ValueError(f"an encoded prompt has {longest} tokens, the transformer reads at most {limit}")
        prompts = torch.stack([F.pad(row, (0, 0, 0, longest - row.shape[0])) for row in rows])
        counts = torch.tensor([[row.shape[0]] for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < counts
        prepared = self.model.prepare_text(prompts[:, None], mask)
        return Conditioning(prepared, IMAGE_FPS if frames == 1 else fps, height, width)

    @torch.no_grad()
    def step(
        self,
        latent: Tensor,
        index: int,
        timesteps: Sequence[float],
        conditioning: Conditioning,
        guidance_scale: float,
        transformer: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Take step `index` from latent float32 [1, C, t, h, w]; returns the next one.

        transformer: another way to run the model, with the arguments of `STDiT3.forward`; a group of workers
        passes its shared one.
        """
        run = transformer or self._captured or self.model

        def velocity(z: Tensor, t: Tensor, text: PreparedText, frame_mask: Tensor | None) -> Tensor:
            size = {"height": conditioning.height, "width": conditioning.width}
            predicted: Tensor = run(z, t, text, x_mask=frame_mask, fps=conditioning.fps, **size)
            return predicted

        return self.flow.step(velocity, latent, index, timesteps, conditioning.text, guidance_scale)

    def start(
        self,
        text: Tensor,
        negative: Tensor | None,
        *,
        width: int,
        height: int,
        frames: int,
        fps: float,
        steps: int,
        guidance_scale: float,
        seed: int,
        latent: Tensor | None = None,
        steps_done: int = 0,
    ) -> "DenoisingRun":
        """Begin a video from its seed, or go on with `latent` [1, C, t, h, w] after `steps_done` steps."""
        if (latent is None) != (steps_done == 0) or not 0 <= steps_done <= steps:
            raise ValueError(f"to go on after step {steps_done} of {steps} takes the latent of that step")
        if latent is None:
            latent = self.initial_latent(seed, frames, height, width)
        expected = self.latent_shape(frames, height, width)
        if tuple(latent.shape) != expected:
            raise ValueError(f"a {frames}x{height}x{width} video has a {expected} latent, got {tuple(latent.shape)}")
        return DenoisingRun(
            self,
            self.prepare(text, negative, frames, height, width, fps),
            self.timesteps(steps, frames, height, width),
            guidance_scale,
            latent.to(self.device),
            steps_done,
        )


@dataclass
class DenoisingRun:
    """One video on its way; `latent` and `steps_done` are all that changes, and all that resuming takes."""

    denoiser: Denoiser
    conditioning: Conditioning
    timesteps: tuple[float, ...]
    guidance_scale: float
    latent: Tensor
    steps_done: int = 0

    @property
    def finished(self) -> bool:
        return self.steps_done == len(self.timesteps)

    def step(self, transformer: Callable[..., Tensor] | None = None) -> None:
        """Take the next step; see `Denoiser.step`."""
        self.latent = self.denoiser.step(
            self.latent, self.steps_done, self.timesteps, self.conditioning, self.guidance_scale, transformer
        )
        self.steps_done += 1


class FrameDecoder:
    """The third phase: latent to frames, one micro-frame at a time."""

    def __init__(self, spec: VideoModelSpec, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self._vae = load_vae(spec.vae, self.device, dtype)

    def decode(self, latent: Tensor, frames: int, height: int, width: int) -> Iterator[Frames]:
        """Latent [1, C, t, h, w] of a video of that size to chunks of uint8 [n, height, width, 3], in order.

        The autoencoder itself rounds a size down to a multiple of its factor; what is missing then (at most
        7 pixels for the published model) is filled by repeating the edges.
        """
        expected = self._vae.latent_size(frames, height, width)
        if tuple(latent.shape[2:]) != expected:
            raise ValueError(f"a {frames}x{height}x{width} video has a {expected} latent, got {tuple(latent.shape)}")
        return self._chunks(latent, frames, height, width)

    def _chunks(self, latent: Tensor, frames: int, height: int, width: int) -> Iterator[Frames]:
        chunks = self._vae.decode_chunks(latent.to(self.device), frames)
        while True:
            # Gradients are off for each chunk, not for whoever consumes it.
            with torch.no_grad():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield to_pixels(fill_edges(chunk[0], height, width))


def fill_edges(video: Tensor, height: int, width: int) -> Tensor:
    """[3, T, H, W] grown evenly on both sides to `height` and `width` by repeating its edges."""
    missing_h, missing_w = height - video.shape[2], width - video.shape[3]
    if not missing_h and not missing_w:
        return video
    left, top = missing_w // 2, missing_h // 2
    return F.pad(video, (left, missing_w - left, top, missing_h - top), mode="replicate")


def to_pixels(video: Tensor) -> Frames:
    """float [3, T, H, W] in about [-1, 1] to uint8 [T, H, W, 3]."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5 + 0.5
    pixels: Frames = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return pixels


class OpenSoraPipeline:
    """The three phases in one process."""

    def __init__(
        self, spec: VideoModelSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.spec = spec
        self.encoder = PromptEncoder(spec, device, dtype)
        self.denoiser = Denoiser(spec, device, dtype)
        self.decoder = FrameDecoder(spec, device, dtype)

    def generate(
        self,
        prompt: str,
        seed: int,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
    ) -> GeneratedVideo:
        """Make a video; what is None is the spec's default."""
        defaults = self.spec.defaults
        frames = defaults.frames if frames is None else frames
        width = defaults.size[0] if width is None else width
        height = defaults.size[1] if height is None else height
        text, *rest = self.encoder.encode([prompt, negative_prompt] if negative_prompt.strip() else [prompt])
        run = self.denoiser.start(
            text,
            rest[0] if rest else None,
            width=width,
            height=height,
            frames=frames,
            fps=defaults.fps if fps is None else fps,
            steps=defaults.steps if steps is None else steps,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            seed=seed,
        )
        while not run.finished:
            run.step()
        chunks = list(self.decoder.decode(run.latent, frames, height, width))
        return GeneratedVideo(run.latent, np.concatenate(chunks))
