"""Tensors over UCX: export one here, send its ``TensorRef`` over NATS, fetch it there.

``port`` says what is promised, ``errors`` what can go wrong; ``ucx.UcxTensors`` is the real thing. Importing this
package loads neither ucxx nor UCX, so a process may fork after it.
"""

from common.tensors.errors import (
    TensorError,
    TensorFetchTimeout,
    TensorMismatch,
    TensorOwnerLost,
    TensorsClosed,
    TensorsFull,
    TensorUnknown,
)
from common.tensors.port import Tensors
from common.tensors.ucx import UcxTensors

__all__ = [
    "TensorError",
    "TensorFetchTimeout",
    "TensorMismatch",
    "TensorOwnerLost",
    "TensorUnknown",
    "Tensors",
    "TensorsClosed",
    "TensorsFull",
    "UcxTensors",
]
