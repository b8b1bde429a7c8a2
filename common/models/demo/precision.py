"""Where training may calculate in bfloat16. Weights, sums of gradients, losses and averages stay in float32."""

import torch


def product_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in the block take `product_type`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_type(device) is torch.bfloat16)
