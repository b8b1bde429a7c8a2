"""A tensor's memory as UCX wants it: flat bytes, where they are, without a copy."""

from functools import lru_cache
from math import prod
from typing import Protocol, Self

import numpy as np
import torch

from common.messages.tensors import TensorRef
from common.tensors.errors import TensorMismatch

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def _dtypes() -> dict[str, torch.dtype]:
    found = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {name.removeprefix("torch."): dtype for name, dtype in found.items()}


_DTYPES = _dtypes()
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """Raises TensorMismatch for a name this torch does not know."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise TensorMismatch(f"this process's torch knows no dtype {name!r}: upgrade it") from None


class ByteRange(Protocol):
    """Flat bytes in place; a slice of them is bytes in place too."""

    def __len__(self) -> int: ...


class CudaBytes:
    """CUDA memory under the CUDA array interface, version 3."""

    def __init__(self, tensor: torch.Tensor, start: int, stop: int) -> None:
        self._tensor = tensor  # keeps the memory
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "data": (self._tensor.data_ptr() + self._start, False),
            "shape": (len(self),),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class TensorBytes:
    """The bytes of a dense, contiguous tensor, in place. Keeps the tensor alive."""

    def __init__(self, tensor: torch.Tensor, what: str = "the tensor") -> None:
        """Raises TensorMismatch where the memory is not one dense run on the CPU or a CUDA device."""
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            raise TensorMismatch(f"{what} must be dense and contiguous: pass {what}.contiguous()")
        if tensor.is_quantized:
            raise TensorMismatch(f"{what} is quantized: send its int_repr(), scale and zero point")
        if not (tensor.is_cpu or tensor.is_cuda):
            raise TensorMismatch(f"{what} is on {tensor.device}: move it to the CPU or a CUDA device")
        if tensor.is_conj() or tensor.is_neg():
            raise TensorMismatch(f"{what} is a lazy conjugate or negative: pass {what}.resolve_conj().resolve_neg()")
        self.tensor = tensor.detach() if tensor.requires_grad else tensor
        self.size_bytes = tensor.nbytes
        self._flat: Bytes | None = None
        if tensor.is_cpu:
            self._flat = self.tensor.view(-1).view(torch.uint8).numpy()

    @classmethod
    def over(cls, flat: Bytes, tensor: torch.Tensor) -> Self:
        """Of a CPU tensor that was made over ``flat``: there is nothing to be checked."""
        made = cls.__new__(cls)
        made.tensor, made.size_bytes, made._flat = tensor, flat.nbytes, flat
        return made

    def range(self, start: int, stop: int) -> ByteRange:
        if self._flat is None:
            return CudaBytes(self.tensor, start, stop)
        return self._flat if stop - start == self.size_bytes else self._flat[start:stop]


def check_reference(ref: TensorRef) -> torch.dtype:
    """The reference's dtype. Raises TensorMismatch where shape, dtype and size contradict each other."""
    return _checked(ref.shape, ref.dtype, ref.size_bytes)


@lru_cache(maxsize=1024)  # a stream of tensors is of few shapes, and this stands before the first byte of each
def _checked(shape: tuple[int, ...], name: str, size_bytes: int) -> torch.dtype:
    dtype = dtype_named(name)
    if any(length < 0 for length in shape) or prod(shape) * dtype.itemsize != size_bytes:
        raise TensorMismatch(f"{shape} of {name} is not {size_bytes} bytes: the reference is damaged")
    return dtype


def check_destination(ref: TensorRef, dtype: torch.dtype, into: torch.Tensor) -> None:
    """Raises TensorMismatch where ``into`` is not what ``ref`` describes."""
    if tuple(into.shape) != ref.shape or into.dtype != dtype:
        raise TensorMismatch(
            f"into is {tuple(into.shape)} of {dtype_name(into.dtype)}, the tensor {ref.shape} of {ref.dtype}: "
            "pass one that fits, or none"
        )
