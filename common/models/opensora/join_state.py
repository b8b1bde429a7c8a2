"""What a worker needs to take the next step of a video that others began: handed over in one broadcast (DDiT)."""

from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from common.models.opensora.pipeline import Denoiser, DenoisingRun


class Broadcaster(Protocol):
    """What is needed of the group; `common.parallel.Group` is one."""

    @property
    def rank(self) -> int: ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Rank `root`'s tensor, on every rank; the others pass one of the same shape and dtype."""


@dataclass(frozen=True)
class JoinState:
    """A video between two steps. Nothing random moves: after the first noise, sampling draws none.

    latent: float32 [1, C, t, h, w] after `steps_done` steps; text, negative: encoded prompts [tokens, C], without
    a negative one every worker has the null caption itself; timesteps: of all steps; fps, frames, height, width:
    of the video, in pixels.
    """

    latent: Tensor
    text: Tensor
    negative: Tensor | None
    steps_done: int
    timesteps: tuple[float, ...]
    guidance_scale: float
    fps: float
    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, run: DenoisingRun, text: Tensor, negative: Tensor | None, *, fps: float, frames: int) -> Self:
        """The state of a run that began with these prompts, frame rate and number of frames."""
        return cls(
            latent=run.latent,
            text=text,
            negative=negative,
            steps_done=run.steps_done,
            timesteps=run.timesteps,
            guidance_scale=run.guidance_scale,
            fps=fps,
            frames=frames,
            height=run.conditioning.height,
            width=run.conditioning.width,
        )

    def resume(self, denoiser: Denoiser) -> DenoisingRun:
        """The run, to go on with on this worker."""
        conditioning = denoiser.prepare(self.text, self.negative, self.frames, self.height, self.width, self.fps)
        return DenoisingRun(
            denoiser,
            conditioning,
            self.timesteps,
            self.guidance_scale,
            self.latent.to(denoiser.device),
            self.steps_done,
        )

    def pack(self) -> bytes:
        """As safetensors, numbers as 0- and 1-dimensional float64, which holds every one of them exactly."""
        entries: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                entries[field.name] = (
                    value.detach().cpu().contiguous()
                    if isinstance(value, Tensor)
                    else torch.tensor(value, dtype=torch.float64)
                )
        data: bytes = save(entries)
        return data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read what `pack` made."""
        entries = load(data)

        def number(name: str) -> float:
            return float(entries[name])

        return cls(
            latent=entries["latent"],
            text=entries["text"],
            negative=entries.get("negative"),
            steps_done=int(number("steps_done")),
            timesteps=tuple(entries["timesteps"].tolist()),
            guidance_scale=number("guidance_scale"),
            fps=number("fps"),
            frames=int(number("frames")),
            height=int(number("height")),
            width=int(number("width")),
        )


def share_state(group: Broadcaster, root: int, state: JoinState | None) -> JoinState:
    """Rank `root`'s state on every rank: its length (8 bytes), then the state in one message.

    Ranks that have the state already take part too, and may pass None and drop what they get.
    """
    data = state.pack() if group.rank == root and state is not None else b""
    if group.rank == root and state is None:
        raise ValueError(f"rank {root} is to share the state and has none")
    length = int(group.broadcast(torch.tensor(len(data), dtype=torch.int64), root))
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(length, dtype=torch.uint8)
    message = group.broadcast(message, root)
    if group.rank == root and state is not None:
        return state
    return JoinState.unpack(message.numpy().tobytes())
