"""Rectified flow against the published code: time steps, whole trajectories, masks, training losses."""

import math

import pytest
import torch
from torch import Tensor

from common.models.opensora import RectifiedFlow
from common.models.opensora.rectified_flow import timestep_transform
from tests.golden.support import golden, tensors

REFERENCE = golden("rflow")
TOLERANCE = REFERENCE["suggested_tolerance"]
ARRAYS = tensors("rflow", "tensors.safetensors")
RUNS = pytest.mark.parametrize("run", REFERENCE["runs"], ids=lambda run: run["name"])


def flow_of(run: dict) -> RectifiedFlow:
    return RectifiedFlow(use_timestep_transform=run["transform"], use_discrete_timesteps=run.get("discrete", False))


def toy_model(run: dict, seen: list[Tensor], masks: list[Tensor]):
    """The reference's toy velocity; keeps what it was shown."""

    def model(x: Tensor, t: Tensor, text: Tensor, x_mask: Tensor | None) -> Tensor:
        seen.append(x[: run["B"]])
        if x_mask is not None:
            masks.append(x_mask[: run["B"]])
        y = text.flatten(1).mean(1)
        time, mean = t.view(-1, 1, 1, 1, 1), y.view(-1, 1, 1, 1, 1)
        velocity = run["a"] * x + run["b"] * time + run["k"] * mean
        return torch.cat((velocity, torch.full_like(velocity, 99.0)), dim=1)

    return model


def doubled_text(run: dict) -> Tensor:
    return torch.cat((torch.ones(run["B"], 1, 3, 5), torch.zeros(run["B"], 1, 3, 5)))


@RUNS
def test_timesteps(run):
    ours = flow_of(run).timesteps(run["steps"], run["height"], run["width"], run["num_frames"])
    for row, expected in zip(ours, run["timesteps"], strict=True):
        assert all(math.isclose(row, value, rel_tol=1e-6) for value in expected)


@RUNS
def test_trajectory(run):
    flow, name = flow_of(run), run["name"]
    seen: list[Tensor] = []
    masks: list[Tensor] = []
    timesteps = flow.timesteps(run["steps"], run["height"], run["width"], run["num_frames"])
    final = flow.sample(
        toy_model(run, seen, masks),
        ARRAYS[f"{name}.z0"],
        timesteps,
        doubled_text(run),
        run["cfg"],
        ARRAYS.get(f"{name}.mask"),
    )
    torch.testing.assert_close(torch.stack([*seen, final]), ARRAYS[f"{name}.trajectory"], **TOLERANCE)
    torch.testing.assert_close(final, ARRAYS[f"{name}.final"], **TOLERANCE)
    if f"{name}.x_mask_seen" in ARRAYS:
        assert torch.equal(torch.stack(masks), ARRAYS[f"{name}.x_mask_seen"])


@pytest.mark.parametrize("row", REFERENCE["timestep_transform"], ids=str)
def test_timestep_transform(row):
    height, width, frames, t, expected = row
    new = timestep_transform(torch.tensor(t), height, width, frames)
    wanted = torch.tensor(math.nan if expected is None else expected)
    torch.testing.assert_close(new, wanted, equal_nan=True, **TOLERANCE)


def test_training_losses():
    flow = RectifiedFlow()
    x0, noise, t = (ARRAYS[f"train.{name}"] for name in ("x0", "noise", "t"))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + t.view(-1, 1, 1, 1, 1) / 1000

    torch.testing.assert_close(flow.add_noise(x0, noise, t), ARRAYS["train.x_t"], **TOLERANCE)
    torch.testing.assert_close(flow.training_losses(model, x0, t, noise), ARRAYS["train.loss"], **TOLERANCE)
    masked = flow.training_losses(model, x0, t, noise, ARRAYS["train.mask"])
    torch.testing.assert_close(masked, ARRAYS["train.loss_masked"], **TOLERANCE)


@RUNS
def test_single_steps_are_the_whole_sample(run):
    flow, name = flow_of(run), run["name"]
    timesteps = flow.timesteps(run["steps"], run["height"], run["width"], run["num_frames"])
    model, text, mask = toy_model(run, [], []), doubled_text(run), ARRAYS.get(f"{name}.mask")
    whole = flow.sample(model, ARRAYS[f"{name}.z0"], timesteps, text, run["cfg"], mask)
    z = ARRAYS[f"{name}.z0"]
    for index in range(run["steps"]):
        # A fresh object for each step: nothing may be carried but the latent and the index.
        z = flow_of(run).step(model, z, index, timesteps, text, run["cfg"], mask)
    assert torch.equal(z, whole)


def test_guidance_of_one_needs_the_conditional_half_only():
    batches = []

    def model(x: Tensor, t: Tensor, text: Tensor, x_mask: Tensor | None) -> Tensor:
        batches.append(x.shape[0])
        return x * text.view(-1, 1, 1, 1, 1)

    z = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    text = torch.tensor([2.0, 3.0, 5.0, 7.0])
    flow, timesteps = RectifiedFlow(), RectifiedFlow().timesteps(4, 8, 8, 3)
    alone = flow.step(model, z, 0, timesteps, text, 1.0)
    nearly = flow.step(model, z, 0, timesteps, text, 1.0 + 1e-9)
    assert batches == [2, 4]
    torch.testing.assert_close(alone, nearly)


def test_a_frame_joins_at_its_share_of_the_way():
    """Half a mask keeps the frame until timestep 500, noises it once, then denoises it."""
    flow = RectifiedFlow()
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(1, 2, 3, 2, 2, generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    timesteps = flow.timesteps(4, 8, 8, 3)
    mask = torch.tensor([[0.0, 0.5, 1.0]])

    def still(x: Tensor, t: Tensor, text: Tensor, x_mask: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    text = torch.zeros(2, 1)
    seen = [z]
    for index in range(4):
        seen.append(flow.step(still, seen[-1], index, timesteps, text, 2.0, mask, noise))
    assert torch.equal(seen[1], z)
    assert torch.equal(seen[2], z)
    halfway = flow.add_noise(z, noise, torch.tensor([500.0]))
    expected = torch.cat((z[:, :, :1], halfway[:, :, 1:2], z[:, :, 2:]), dim=2)
    torch.testing.assert_close(seen[3], expected)
    assert torch.equal(seen[4], seen[3])
    with pytest.raises(ValueError, match="needs mask_noise"):
        flow.step(still, z, 2, timesteps, text, 2.0, mask)


def test_schedules_that_cannot_work_are_refused():
    flow = RectifiedFlow(use_timestep_transform=True)
    with pytest.raises(ValueError, match="counts 16 frames as no latent frame"):
        flow.timesteps(10, 64, 64, 16)
    assert len(flow.timesteps(10, 64, 64, 17)) == 10
    with pytest.raises(ValueError, match="at least 1"):
        flow.timesteps(0, 64, 64, 17)
    with pytest.raises(ValueError, match="step 3 is outside"):
        flow.step(lambda *_: torch.zeros(1), torch.zeros(1, 1, 1, 1, 1), 3, (1000.0,), torch.zeros(2), 1.0)


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
def test_training_timesteps(method):
    flow = RectifiedFlow()
    draws = [flow.sample_timesteps(4000, torch.Generator().manual_seed(seed), method, loc=0.3) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].min() >= 0 and draws[0].max() <= 1000
    median = 1000 / (1 + math.exp(-0.3)) if method == "logit-normal" else 500
    assert abs(draws[0].median().item() - median) < 25
    large = RectifiedFlow(use_timestep_transform=True)
    moved = large.sample_timesteps(4000, torch.Generator().manual_seed(1), method, 0.3, video_size=(102, 720, 1280))
    torch.testing.assert_close(moved, timestep_transform(draws[0], 720, 1280, 102))
    with pytest.raises(ValueError, match="needs video_size"):
        large.sample_timesteps(1, torch.Generator())
