"""The optimiser of the demo model: Muon on matrices and convolution kernels, AdamW on everything else, EMA.

Muon (Jordan et al., 2024): the momentum of a matrix is made nearly orthogonal by a Newton-Schulz iteration, so
every direction of the matrix learns at one speed. Here it needs about half of AdamW's steps.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.models.demo.parallel import Workers
from common.models.demo.precision import product_type

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of each matrix of a batch [N, rows, columns]."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(product_type(x.device))
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    direction: Tensor = (x.transpose(1, 2) if tall else x).to(matrices.dtype)
    return direction


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; kernels count as matrices [out, the rest].

    Equal shapes go as one batch. Of several workers each orthogonalises its share of the matrices for all.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, workers: Workers, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self._workers = workers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
            for parameter, direction in zip(parameters, self._directions(updates), strict=True):
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        if gradient is None:
            raise ValueError("a parameter without a gradient has no momentum")
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum).flatten(1)

    def _directions(self, updates: list[Tensor]) -> list[Tensor]:
        by_shape: dict[torch.Size, list[int]] = {}
        for index, update in enumerate(updates):
            by_shape.setdefault(update.shape, []).append(index)
        directions = [torch.zeros_like(update) for update in updates]
        for indices in by_shape.values():
            mine = indices[self._workers.rank :: self._workers.count]
            if mine:
                for index, direction in zip(mine, orthogonalise(torch.stack([updates[i] for i in mine])), strict=True):
                    directions[index] = direction
        return self._workers.sum(directions)


class Optimiser:
    """Muon for `matrices`, AdamW for `others`; `set_progress` gives both their learning rate."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        matrix_lr: float,
        other_lr: float,
        workers: Workers,
        warmup: float = 0.02,
        decay_from: float = 0.4,
    ) -> None:
        self.muon = Muon(matrices, lr=matrix_lr, workers=workers)
        self.adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self._rates = (matrix_lr, other_lr)
        self._warmup, self._decay_from = warmup, decay_from
        self._parameters = [*matrices, *others]
        self._workers = workers

    def set_progress(self, progress: float) -> None:
        """`progress` in 0..1: linear warm-up, a level stretch, then a cosine down to zero."""
        factor = min(1.0, (progress + 1e-3) / self._warmup)
        if progress > self._decay_from:
            factor *= 0.5 * (1 + math.cos(math.pi * (progress - self._decay_from) / (1 - self._decay_from)))
        for optimiser, rate in zip((self.muon, self.adam), self._rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    def step(self, clip: float = 1.0) -> float:
        """One update from the gradients, which are then cleared. Returns the gradient's norm before clipping."""
        self._workers.average_gradients(self._parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, clip))
        if math.isfinite(norm):
            self.muon.step()
            self.adam.step()
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


class Average:
    """Exponential moving average of a module's floating-point state, with a short memory at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            average = self.values[name]
            if value.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, object]) -> None:
        updates, values = state["updates"], state["values"]
        if not isinstance(updates, int) or not isinstance(values, dict):
            raise ValueError("a checkpoint's average must hold updates and values")
        self.updates = updates
        for name, value in values.items():
            self.values[name].copy_(value)
