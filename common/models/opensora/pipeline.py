"""The three phases of a video, one object each, and the three in a row.

A service holds one phase and calls exactly these methods, so a video made by the services and one made by
`OpenSoraPipeline` in a single process are the same by construction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.models.opensora.errors import ModelLoadError
from common.models.opensora.loading import fetch, load_stdit3, load_vae, read_vae_config
from common.models.opensora.rectified_flow import RectifiedFlow
from common.models.opensora.spec import VideoModelSpec
from common.models.opensora.stdit3 import PreparedText
from common.models.opensora.text import TextEmbedding, TextEncoder

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
        self._encoder = TextEncoder(spec.text_encoder, spec.max_prompt_tokens, device, dtype)

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt; the spec's `max_prompt_tokens` is the limit."""
        return self._encoder.token_count(prompt)

    def encode(self, prompts: list[str]) -> TextEmbedding:
        """float32 [B, 1, L, C] with its mask. Raises PromptTooLongError."""
        return self._encoder.encode(prompts)


class Denoiser:
    """The second phase: noise to latent, one step at a time."""

    def __init__(self, spec: VideoModelSpec, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.flow = RectifiedFlow(**asdict(spec.flow))
        self.model = load_stdit3(spec.transformer, self.device, dtype)
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
        self, text: TextEmbedding, negative: TextEmbedding | None, frames: int, height: int, width: int, fps: float
    ) -> Conditioning:
        """Make ready what all steps share. Without a negative prompt the model's null caption takes its place.

        As published, the null caption is read under the prompt's own mask.
        """
        text = text.to(self.device)
        if negative is None:
            null = self.model.null_embedding(length=text.embeddings.shape[2]).to(text.embeddings.dtype)
            prompts, mask = torch.cat((text.embeddings, null)), text.mask
        else:
            negative = negative.to(self.device)
            prompts, mask = torch.cat((text.embeddings, negative.embeddings)), torch.cat((text.mask, negative.mask))
        prepared = self.model.prepare_text(prompts, mask)
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
        run = self.model if transformer is None else transformer

        def velocity(z: Tensor, t: Tensor, text: PreparedText, frame_mask: Tensor | None) -> Tensor:
            size = {"height": conditioning.height, "width": conditioning.width}
            predicted: Tensor = run(z, t, text, x_mask=frame_mask, fps=conditioning.fps, **size)
            return predicted

        return self.flow.step(velocity, latent, index, timesteps, conditioning.text, guidance_scale)


class FrameDecoder:
    """The third phase: latent to frames, one micro-frame at a time."""

    def __init__(self, spec: VideoModelSpec, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self._vae = load_vae(spec.vae, self.device, dtype)

    def decode(self, latent: Tensor, frames: int, height: int, width: int) -> Iterator[Frames]:
        """Latent [1, C, t, h, w] of a video of that size to chunks of uint8 [n, H, W, 3], in order.

        Sizes that the autoencoder's factor does not divide come out rounded down to the next that it does.
        """
        expected = self._vae.latent_size(frames, height, width)
        if tuple(latent.shape[2:]) != expected:
            raise ValueError(f"a {frames}x{height}x{width} video has a {expected} latent, got {tuple(latent.shape)}")
        return self._chunks(latent, frames)

    def _chunks(self, latent: Tensor, frames: int) -> Iterator[Frames]:
        chunks = self._vae.decode_chunks(latent.to(self.device), frames)
        while True:
            # Gradients are off for each chunk, not for whoever consumes it.
            with torch.no_grad():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield to_pixels(chunk[0])


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
        text = self.encoder.encode([prompt])
        negative = self.encoder.encode([negative_prompt]) if negative_prompt.strip() else None
        conditioning = self.denoiser.prepare(
            text, negative, frames, height, width, defaults.fps if fps is None else fps
        )
        timesteps = self.denoiser.timesteps(defaults.steps if steps is None else steps, frames, height, width)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        latent = self.denoiser.initial_latent(seed, frames, height, width)
        for index in range(len(timesteps)):
            latent = self.denoiser.step(latent, index, timesteps, conditioning, scale)
        return GeneratedVideo(latent, np.concatenate(list(self.decoder.decode(latent, frames, height, width))))
