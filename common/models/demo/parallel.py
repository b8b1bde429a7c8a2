"""Data-parallel training on the cores of one machine: one single-threaded process for each, gradients averaged.

Small layers gain little from threads, and threads wait for each other thousands of times a step; processes wait
once. With one worker nothing here does anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WAIT = timedelta(minutes=15)


@dataclass(frozen=True)
class Workers:
    """This process's place among `count` alike."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first worker's value."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every worker the mean of all workers' gradients; a parameter without one counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat.div_(self.count)
        for gradient, part in zip(
            gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all workers of tensors that each has in the same shapes."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def wait(self) -> None:
        """Until every worker is here."""
        if self.count > 1:
            dist.barrier()


def join(rank: int, count: int, meeting: Path) -> Workers:
    """Meet the other workers over the file `meeting`, which must not exist when the first one comes."""
    if count > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=_WAIT)
    return Workers(rank, count)


def leave(workers: Workers) -> None:
    if workers.count > 1:
        dist.destroy_process_group()
