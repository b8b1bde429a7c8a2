"""Rectified flow (arXiv 2209.03003) as Open-Sora 1.2 samples and trains it, one step at a time.

Timesteps run from 1000 (noise) to 0 (video). The model predicts the velocity `video - noise`; a step is one
Euler step. Nothing here keeps state or draws random numbers of its own: a step is a function of the latent, the
step index and its arguments, so any worker can take the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor


class GuidedText(Protocol):
    """A doubled batch of prompts: the first half conditional, the second half null or negative."""

    def rows(self, start: int, stop: int) -> Self:
        """The prompts `start` to `stop`."""


Text = TypeVar("Text", bound=GuidedText | Tensor)
# (latent [R, C, T, H, W], timestep [R], text of R rows, frame mask bool [R, T] or None) -> [R, C or 2C, T, H, W]
VelocityModel = Callable[[Tensor, Tensor, Text, Tensor | None], Tensor]


def timestep_transform(
    timestep: Tensor,
    height: float,
    width: float,
    num_frames: int,
    num_timesteps: int = 1000,
    scale: float = 1.0,
    base_resolution: float = 512 * 512,
    base_num_frames: int = 1,
) -> Tensor:
    """Move timesteps (float32, any shape) towards noise for large videos, which lose their content later.

    The published rule counts `num_frames // 17 * 5` latent frames, whatever the VAE does: 0 below 17 frames.
    """
    frames = 1 if num_frames == 1 else num_frames // 17 * 5
    space = (torch.tensor(float(height * width)) / base_resolution).sqrt()
    time = (torch.tensor(float(frames)) / base_num_frames).sqrt()
    ratio = (space * time * scale).to(timestep.device)
    t = timestep / num_timesteps
    return ratio * t / (1 + (ratio - 1) * t) * num_timesteps


@dataclass(frozen=True)
class RectifiedFlow:
    """`use_timestep_transform`: adapt the steps to the size of the video; `transform_scale` strengthens it;
    `use_discrete_timesteps`: whole numbers only."""

    num_timesteps: int = 1000
    use_timestep_transform: bool = False
    transform_scale: float = 1.0
    use_discrete_timesteps: bool = False

    def timesteps(self, steps: int, height: int, width: int, num_frames: int) -> tuple[float, ...]:
        """The times of `steps` steps, falling from 1000, as float32 values. Sizes in pixels and video frames."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        times = [(1.0 - index / steps) * self.num_timesteps for index in range(steps)]
        if self.use_discrete_timesteps:
            times = [float(round(time)) for time in times]
        values = torch.tensor(times, dtype=torch.float32)
        if self.use_timestep_transform:
            self._check_transform(num_frames)
            values = self._transform(values, height, width, num_frames)
        return tuple(values.tolist())

    def _transform(self, times: Tensor, height: int, width: int, num_frames: int) -> Tensor:
        return timestep_transform(times, height, width, num_frames, self.num_timesteps, scale=self.transform_scale)

    @staticmethod
    def _check_transform(num_frames: int) -> None:
        if 1 < num_frames < 17:
            raise ValueError(
                f"the timestep transform counts {num_frames} frames as no latent frame at all: "
                "use 1 frame, 17 or more, or turn use_timestep_transform off"
            )

    def step(
        self,
        model: VelocityModel[Text],
        z: Tensor,
        index: int,
        timesteps: Sequence[float],
        text: Text,
        guidance_scale: float,
        frame_mask: Tensor | None = None,
        mask_noise: Tensor | None = None,
    ) -> Tensor:
        """Take step `index` of `timesteps` from latent z [B, C, T, H, W]; returns the next latent.

        text: 2B rows, conditional then null. With a guidance scale of 1 the null half has no weight and is not
        computed. frame_mask: [B, T] in 0..1, how much of each frame is made anew: 0 keeps it as it is in z, 1
        makes it from noise, a value between joins at that share of the way and then needs `mask_noise`
        (shaped like z), the noise that frame starts from.
        """
        if not 0 <= index < len(timesteps):
            raise ValueError(f"step {index} is outside the schedule of {len(timesteps)} steps")
        given = z
        active: Tensor | None = None
        if frame_mask is not None:
            active = self._active(frame_mask, timesteps[index])
            z = self._join(z, index, timesteps, frame_mask, active, mask_noise)
        velocity = self._velocity(model, z, timesteps[index], text, guidance_scale, active)
        following = timesteps[index + 1] if index + 1 < len(timesteps) else 0.0
        z = z + velocity * ((timesteps[index] - following) / self.num_timesteps)
        return z if active is None else torch.where(active[:, None, :, None, None], z, given)

    def _active(self, frame_mask: Tensor, timestep: float) -> Tensor:
        return frame_mask * self.num_timesteps >= timestep

    def _join(
        self,
        z: Tensor,
        index: int,
        timesteps: Sequence[float],
        frame_mask: Tensor,
        active: Tensor,
        mask_noise: Tensor | None,
    ) -> Tensor:
        """Add noise to the frames whose way begins with this step."""
        before = frame_mask == 1 if index == 0 else self._active(frame_mask, timesteps[index - 1])
        joining = active & ~before
        if mask_noise is None:
            if bool(joining.any()):
                raise ValueError("a frame mask with values between 0 and 1 needs mask_noise")
            return z
        times = torch.full((z.shape[0],), timesteps[index], dtype=torch.float32, device=z.device)
        return torch.where(joining[:, None, :, None, None], self.add_noise(z, mask_noise, times), z)

    @staticmethod
    def _velocity(
        model: VelocityModel[Text],
        z: Tensor,
        timestep: float,
        text: Text,
        guidance_scale: float,
        active: Tensor | None,
    ) -> Tensor:
        batch, channels = z.shape[:2]
        if guidance_scale == 1.0:
            times = torch.full((batch,), timestep, dtype=torch.float32, device=z.device)
            return model(z, times, first_rows(text, batch), active)[:, :channels]
        times = torch.full((2 * batch,), timestep, dtype=torch.float32, device=z.device)
        doubled_mask = None if active is None else active.repeat(2, 1)
        predicted = model(torch.cat((z, z)), times, text, doubled_mask)[:, :channels]
        conditional, null = predicted.chunk(2)
        return null + guidance_scale * (conditional - null)

    def sample(
        self,
        model: VelocityModel[Text],
        z: Tensor,
        timesteps: Sequence[float],
        text: Text,
        guidance_scale: float,
        frame_mask: Tensor | None = None,
        mask_noise: Tensor | None = None,
    ) -> Tensor:
        """Every step in turn, from noise z to the finished latent."""
        for index in range(len(timesteps)):
            z = self.step(model, z, index, timesteps, text, guidance_scale, frame_mask, mask_noise)
        return z

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latent at `timesteps` [B] on the straight way between x0 and noise, both [B, C, T, H, W]."""
        share = (1 - timesteps.float() / self.num_timesteps).view(-1, 1, 1, 1, 1)
        return share * x0 + (1 - share) * noise

    def sample_timesteps(
        self,
        batch: int,
        generator: torch.Generator,
        method: Literal["uniform", "logit-normal"] = "uniform",
        loc: float = 0.0,
        scale: float = 1.0,
        video_size: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Training timesteps [batch], float32 on the generator's device.

        loc, scale: of the normal distribution whose sigmoid "logit-normal" takes. video_size: (frames, height,
        width) in pixels, needed for the timestep transform.
        """
        if method == "uniform":
            share = torch.rand(batch, generator=generator, device=generator.device)
        else:
            normal = torch.randn(batch, generator=generator, device=generator.device)
            share = torch.sigmoid(loc + scale * normal)
        times = share * self.num_timesteps
        if self.use_discrete_timesteps:
            times = times.round()
        if self.use_timestep_transform:
            if video_size is None:
                raise ValueError("the timestep transform needs video_size")
            self._check_transform(video_size[0])
            times = self._transform(times, video_size[1], video_size[2], video_size[0])
        return times

    def training_losses(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error [B] of the predicted velocity; only frames true in frame_mask [B, T] count, and only
        they are noised. `model` takes the noisy latent and the timesteps."""
        noisy = self.add_noise(x0, noise, timesteps)
        if frame_mask is not None:
            still = self.add_noise(x0, noise, torch.zeros_like(timesteps))
            noisy = torch.where(frame_mask[:, None, :, None, None], noisy, still)
        predicted = model(noisy, timesteps)[:, : x0.shape[1]]
        error = (predicted - velocity_target(x0, noise)).pow(2)
        if frame_mask is None:
            return error.flatten(1).mean(1)
        per_frame = error.mean((1, 3, 4))
        return (per_frame * frame_mask).sum(1) / frame_mask.sum(1)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict: the direction from noise to video."""
    return x0 - noise


def first_rows(text: Text, count: int) -> Text:
    """The first `count` prompts of a batch."""
    if isinstance(text, Tensor):
        return text[:count]  # type: ignore[return-value]
    return text.rows(0, count)
