"""Training the autoencoder: its two halves one after the other, then both together.

1. `spatial`: the 2-D half learns from crops of single frames.
2. `temporal`: the temporal half learns to squeeze the first one's latents.
3. `joint`: all but the 2-D encoder learn together from the pixels of short clips, with sampled latents and a slight
   KL term.

Crops are mixed with whole pictures because group norms see the share of the picture that the object fills.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.demo.loop import Budget, Stage, generator_of, run, split_parameters, torch_generator_of
from common.models.demo.optim import Average, Optimiser
from common.models.demo.parallel import Workers
from common.models.demo.pool import ClipPool, pixel_weights
from common.models.demo.precision import mixed_precision
from common.models.demo.settings import VAE, Budgets
from common.models.opensora.latents import LatentDistribution
from common.models.opensora.spatial_vae import SpatialVAE
from common.models.opensora.vae import OpenSoraVAE

_CROPS: tuple[tuple[int, float], ...] = ((32, 0.5), (48, 0.3), (64, 0.1), (96, 0.06), (128, 0.04))
"""(side in pixels, probability)."""
_IMAGE_PIXELS = 48 * 1024
_CLIP_PIXELS = 128 * 1024
_TEMPORAL_LATENTS = 6 * 1024
_CACHED = ((48, 1400), (64, 400), (96, 100), (128, 40))
"""(side in pixels, pieces of 16 frames) whose 2-D latents the temporal stage learns from."""
_KL_WEIGHT = 3e-4
_LOG_VARIANCE_OF_NONE = -20.0
_KEPT_FROM_MUON = ("conv_in", "conv_out", "quant_conv", "encoder.conv2", "decoder.conv1")


def train_vae(
    folder: Path, budgets: Budgets, seed: int, device: torch.device, resume: bool, workers: Workers
) -> OpenSoraVAE:
    """Run the three stages, or what is left of them; the result is on `device`, in eval mode."""
    torch.manual_seed(seed)
    vae = OpenSoraVAE(VAE).to(device)
    pool = ClipPool(budgets.clips_in_pool // workers.count, generator_of(seed, 0, workers.rank))
    calibration = ClipPool(56, generator_of(seed, 4))
    spatial = vae.spatial_vae

    def spatial_loss(rng: np.random.Generator, _: float) -> Tensor:
        video = _crops(pool, rng, 1, _IMAGE_PIXELS // workers.count).to(device)
        with mixed_precision(device):
            latent = spatial.encode(video)
            decoded = spatial.decode(latent)
        return pixel_loss(decoded.float(), video) + 1e-4 * latent.float().pow(2).mean()

    def temporal_loss(rng: np.random.Generator, _: float) -> Tensor:
        latent, weights = (part.to(device) for part in latents.draw(rng, _TEMPORAL_LATENTS // workers.count))
        with mixed_precision(device):
            posterior = vae.temporal_vae.encode(latent)
            decoded = vae.temporal_vae.decode(posterior.sample(torch_generator_of(rng)), latent.shape[2])
        error = decoded.float() - latent
        return (weights * (error.abs() + error.pow(2))).mean() + _KL_WEIGHT * kl_loss(posterior)

    def joint_loss(rng: np.random.Generator, _: float) -> Tensor:
        frames = 16 if rng.random() < 0.75 else 8
        video = _crops(pool, rng, frames, _CLIP_PIXELS // workers.count).to(device)
        with mixed_precision(device):
            with torch.no_grad():
                latent = spatial.encode(video)
            posterior = vae.temporal_vae.encode(latent)
            sample = posterior.sample(torch_generator_of(rng))
            decoded = spatial.decode(vae.temporal_vae.decode(sample, frames))
        return pixel_loss(decoded.float(), video) + _KL_WEIGHT * kl_loss(posterior)

    _run_stage(workers, folder, seed + 1, resume, "spatial", spatial, budgets.spatial, spatial_loss, 0.02, 2e-3)
    with torch.no_grad():
        _normalise_spatial(vae, _crops(calibration, generator_of(seed, 1), 1, 8 * _IMAGE_PIXELS).to(device))
    latents = LatentPool(spatial, pool, generator_of(seed, 5, workers.rank), workers.count)
    temporal = vae.temporal_vae
    _run_stage(workers, folder, seed + 2, resume, "temporal", temporal, budgets.temporal, temporal_loss, 0.02, 2e-3)
    # Batches are small here and the weights are good already: larger steps would undo more than they mend.
    _run_stage(workers, folder, seed + 3, resume, "joint", vae, budgets.joint, joint_loss, 0.002, 5e-4)
    return vae.eval()


def load_vae(folder: Path, device: torch.device) -> OpenSoraVAE:
    """The averaged weights of the last finished or interrupted `joint` stage."""
    vae = OpenSoraVAE(VAE)
    state = torch.load(folder / "joint.pt", map_location="cpu", weights_only=True)
    vae.load_state_dict(state["average"]["values"])
    return vae.to(device).eval()


class LatentPool:
    """2-D latents of pieces of clips, encoded once: the temporal half sees each many times, cut out anew."""

    def __init__(self, spatial: SpatialVAE, pool: ClipPool, rng: np.random.Generator, workers: int) -> None:
        self._groups: list[tuple[Tensor, Tensor]] = []
        for side, count in _CACHED:
            parts = [self._encode(spatial, pool.crops(rng, 4, 16, side)) for _ in range(-(-count // workers // 4))]
            latents, weights = zip(*parts, strict=True)
            self._groups.append((torch.cat(latents), torch.cat(weights)))
        sizes = np.asarray([latent[:, 0].numel() for latent, _ in self._groups], dtype=float)
        self._shares = sizes / sizes.sum()

    @staticmethod
    @torch.no_grad()
    def _encode(spatial: SpatialVAE, video: Tensor) -> tuple[Tensor, Tensor]:
        latent = spatial.encode(video.to(next(spatial.parameters()).device)).cpu()
        weights = F.avg_pool2d(_frame_weights(video), kernel_size=video.shape[-1] // latent.shape[-1])
        return latent, weights.view(video.shape[0], -1, *weights.shape[1:]).transpose(1, 2)

    def draw(self, rng: np.random.Generator, positions: int) -> tuple[Tensor, Tensor]:
        """(latents [B, C, T, h, w], weights [B, 1, T, h, w]) of about `positions` places in all."""
        latents, weights = self._groups[int(rng.choice(len(self._groups), p=self._shares))]
        frames = 16 if rng.random() < 0.8 else 8
        side = min(latents.shape[-1], 8) - int(rng.integers(3)) if latents.shape[-1] <= 8 else latents.shape[-1]
        rows = torch.from_numpy(rng.integers(len(latents), size=max(1, positions // (frames * side * side))))
        start = int(rng.integers(16 - frames + 1))
        top, left = (int(value) for value in rng.integers(latents.shape[-1] - side + 1, size=2))
        window = (rows, slice(None), slice(start, start + frames), slice(top, top + side), slice(left, left + side))
        return latents[window], weights[window]


def _run_stage(
    workers: Workers,
    folder: Path,
    seed: int,
    resume: bool,
    name: str,
    module: nn.Module,
    budget: Budget,
    loss_of: Callable[[np.random.Generator, float], Tensor],
    matrix_lr: float,
    other_lr: float,
) -> None:
    matrices, others = split_parameters(module, _KEPT_FROM_MUON)
    optimiser = Optimiser(matrices, others, matrix_lr, other_lr, workers)
    run(Stage(name, budget, module, optimiser, Average(module, 0.995), loss_of, seed, workers), folder, resume)


def _crops(pool: ClipPool, rng: np.random.Generator, frames: int, pixels: int) -> Tensor:
    sides, shares = zip(*_CROPS, strict=True)
    side = int(rng.choice(sides, p=shares))
    return pool.crops(rng, max(1, pixels // (frames * side * side)), frames, side)


def _frame_weights(video: Tensor) -> Tensor:
    """`pixel_weights` of every frame of a video [B, 3, T, H, W], as [B*T, 1, H, W]."""
    return pixel_weights(video.transpose(1, 2).flatten(0, 1))


def pixel_loss(decoded: Tensor, video: Tensor) -> Tensor:
    """L1 and L2 between videos [B, 3, T, H, W]; the object counts more than the background."""
    error = (decoded - video).transpose(1, 2).flatten(0, 1)
    return (_frame_weights(video) * (error.abs() + 2 * error.pow(2))).mean()


def kl_loss(posterior: LatentDistribution) -> Tensor:
    """Mean divergence of the posterior from a unit normal, per latent number."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


def _normalise_spatial(vae: OpenSoraVAE, images: Tensor) -> None:
    """Scale the 2-D latents to unit deviation, without changing what is decoded from them; drop their noise."""
    latent = vae.spatial_vae.encode(images)
    deviation = latent.std(dim=(0, 2, 3, 4))
    module = vae.spatial_vae.module
    channels = deviation.shape[0]
    module.quant_conv.weight[:channels].div_(deviation[:, None, None, None])
    module.quant_conv.weight[channels:].zero_()
    if module.quant_conv.bias is not None:
        module.quant_conv.bias[:channels].div_(deviation)
        module.quant_conv.bias[channels:].fill_(_LOG_VARIANCE_OF_NONE)
    module.post_quant_conv.weight.mul_(deviation[None, :, None, None])


@torch.no_grad()
def reconstruction_psnr(vae: OpenSoraVAE, pool: ClipPool) -> float:
    """Peak signal-to-noise ratio in dB over whole clips, encoded and decoded as at inference."""
    errors = []
    for clip in pool.clips:
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        video = video.to(vae.dtype).to(vae.shift.device)
        decoded = vae.decode(vae.encode(video), clip.spec.frames).clamp(-1, 1)
        errors.append(float((decoded - video).pow(2).mean()))
    return float(10 * np.log10(4.0 / np.mean(errors)))
