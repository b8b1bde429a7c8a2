"""What is compared at both ends of a transfer."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def checksums(runs: Sequence[Tensor]) -> list[int]:
    """The CRC-32 of each block of runs of blocks [n, ...], in order. As ``checksum`` for the rest."""
    return [checksum([block]) for run in runs for block in run.detach().cpu()]


def checksum(tensors: Sequence[Tensor]) -> int:
    """CRC-32 over their bytes in order. Takes a while, and leaves the interpreter free meanwhile."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().view(torch.uint8).reshape(-1).numpy().data, value)
    return value
