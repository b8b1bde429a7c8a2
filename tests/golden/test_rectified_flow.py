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
