"""Matrix products with weights laid out for the processor once, and with what follows them done in the same kernel."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN's names of the activations that models' configurations name.
_ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "silu": ("swish", "", F.silu),
    "gelu": ("gelu", "none", F.gelu),
    "gelu_pytorch_tanh": ("gelu", "tanh", lambda x: F.gelu(x, approximate="tanh")),
}

_mkldnn = torch.ops.mkldnn


def knows_activation(name: str) -> bool:
    return name in _ACTIVATIONS


def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN computes with this type faster than the plain kernels do."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(_mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class Linear:
    """x W^T + b for x of shape [rows, inputs], optionally with an activation, a factor or a summand.

    Args:
        weight: [outputs, inputs].
        bias: [outputs].
        activation: one that ``knows_activation``, for ``activated``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> None:
        self._packed = packs(weight.dtype) and weight.device.type == "cpu"
        # The layout is chosen for few rows, as in decoding; with many rows it costs nothing.
        self._weight = _mkldnn._reorder_linear_weight(weight.contiguous(), 16) if self._packed else weight
        self._bias = bias
        self._fused, self._algorithm, self._plain = _ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return _mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self._bias)

    def activated(self, x: Tensor) -> Tensor:
        """activation(x W^T + b)."""
        if self._packed:
            return _mkldnn._linear_pointwise(  # type: ignore[no-any-return]
                x, self._weight, self._bias, self._fused, [], self._algorithm
            )
        return self._plain(F.linear(x, self._weight, self._bias))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(x W^T + b) * factor."""
        if self._packed:
            return _mkldnn._linear_pointwise(x, factor, self._weight, self._bias, "mul")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self._bias) * factor

    def plus(self, x: Tensor, summand: Tensor) -> Tensor:
        """x W^T + b + summand."""
        if self._packed:
            return _mkldnn._linear_pointwise(x, summand, self._weight, self._bias, "add")  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self._bias) + summand
