"""How fast a card multiplies matrices and moves memory: measured, and the former as its data sheet says."""

import torch

from loadgen.gpu.measure import Failed, measure

# Dense bfloat16, in operations a second: the data sheets' figures without sparsity. The first name that fits counts.
_DATA_SHEETS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)
_SIDES = (4096, 8192, 16384)
_COPIED_BYTES = 2 << 30


def data_sheet_flops(card: str) -> float | None:
    """Dense bfloat16 operations a second of the card of that name; None for one that is not in the list."""
    return next((flops for name, flops in _DATA_SHEETS if name in card), None)


def matrix_flops(device: torch.device, dtype: torch.dtype, warm_up: int, repeats: int) -> float:
    """Operations a second of the best of a few square products; a CPU gets a small one.

    Random numbers, as zeros draw less power and let a card clock higher than any model does.
    """
    best = 0.0
    for side in _SIDES if device.type == "cuda" else (512,):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)
        reading = measure(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device, warm_up, repeats)  # type: ignore[misc]
        if not isinstance(reading, Failed):
            best = max(best, 2 * side**3 / reading.median_s)
    return best


def copy_bytes(device: torch.device, warm_up: int, repeats: int) -> float:
    """Bytes a second that a large copy reads and writes within the device's memory; a CPU gets a small one."""
    count = _COPIED_BYTES if device.type == "cuda" else 1 << 20
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    reading = measure(lambda: target.copy_(source), device, warm_up, repeats)
    return 0.0 if isinstance(reading, Failed) else 2 * count / reading.median_s
