"""The training loop every stage shares: progress by steps or by time, averages, checkpoints, resuming."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.models.demo.optim import Average, Optimiser
from common.models.demo.parallel import Workers

_LOG_EVERY_S = 15.0
_SAVE_EVERY_S = 90.0


@dataclass(frozen=True)
class Budget:
    """A stage ends after `steps`, or after `seconds` if those pass first; the learning rate follows the nearer end."""

    steps: int
    seconds: float

    def progress(self, step: int, elapsed_s: float) -> float:
        return min(1.0, max(step / self.steps, elapsed_s / self.seconds))


@dataclass(frozen=True)
class Stage:
    """One stage of training: `loss_of(rng, progress)` draws a batch with its step's generator, returns its loss."""

    name: str
    budget: Budget
    module: nn.Module
    optimiser: Optimiser
    average: Average
    loss_of: Callable[[np.random.Generator, float], Tensor]
    seed: int
    workers: Workers


def generator_of(seed: int, *path: int) -> np.random.Generator:
    """An independent generator for one purpose, so that a resumed run draws what an unbroken one draws."""
    return np.random.default_rng([seed, *path])


def torch_generator_of(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def split_parameters(module: nn.Module, keep_out: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices and kernels for Muon, the rest for AdamW); names containing one of `keep_out` go to the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.ndim >= 2 and min(parameter.flatten(1).shape) >= 8
            (matrices if wanted and not any(part in name for part in keep_out) else others).append(parameter)
    return matrices, others


def run(stage: Stage, folder: Path, resume: bool) -> float:
    """Train until the budget is used; leaves `NAME.pt` in `folder` and the average's values in the module.

    Returns the seconds trained, those before a resumption included.
    """
    path = folder / f"{stage.name}.pt"
    step, before_s = _load(stage, path) if resume and path.exists() else (0, 0.0)
    workers = stage.workers
    workers.wait()
    started_s = logged_s = saved_s = time.monotonic()
    losses: list[float] = []
    while True:
        now_s = time.monotonic()
        elapsed_s = before_s + now_s - started_s
        progress = workers.agree(stage.budget.progress(step, elapsed_s))
        if workers.first and losses and (now_s - logged_s > _LOG_EVERY_S or progress >= 1.0):
            pace = f"{len(losses) / (now_s - logged_s):.2f} steps/s, {elapsed_s / 60:.1f} min"
            print(f"{stage.name}: step {step}, {progress:.1%}, loss {np.mean(losses):.5f}, {pace}", flush=True)
            losses, logged_s = [], now_s
        if workers.first and (progress >= 1.0 or now_s - saved_s > _SAVE_EVERY_S):
            _save(stage, path, step, elapsed_s)
            saved_s = now_s
        if progress >= 1.0:
            break
        stage.optimiser.set_progress(progress)
        loss = stage.loss_of(generator_of(stage.seed, step, workers.rank), progress)
        loss.backward()  # type: ignore[no-untyped-call]
        stage.optimiser.step()
        stage.average.update(stage.module)
        losses.append(float(loss.detach()))
        step += 1
    stage.module.load_state_dict(stage.average.values)
    workers.wait()
    return elapsed_s


def _save(stage: Stage, path: Path, step: int, elapsed_s: float) -> None:
    state = {
        "step": step,
        "elapsed_s": elapsed_s,
        "module": stage.module.state_dict(),
        "optimiser": stage.optimiser.state_dict(),
        "average": stage.average.state_dict(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _load(stage: Stage, path: Path) -> tuple[int, float]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    stage.module.load_state_dict(state["module"])
    stage.optimiser.load_state_dict(state["optimiser"])
    stage.average.load_state_dict(state["average"])
    return int(state["step"]), float(state["elapsed_s"])
