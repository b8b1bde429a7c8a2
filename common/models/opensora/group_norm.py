"""Group norm and SiLU, which stand before every convolution of the autoencoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.gpu.kernels import gpu_kernels


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of x [B, C, ...]."""
    kernels = gpu_kernels(x)
    if kernels is not None:
        return kernels.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps, silu=True)
    return F.silu(norm(x))
