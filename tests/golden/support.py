"""Reading the reference data in `data/` (made by the public Open-Sora code, tag v1.2.0)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"


def golden(folder: str) -> dict[str, Any]:
    return json.loads((DATA / folder / "golden.json").read_text())


def tensors(folder: str, file: str) -> dict[str, Tensor]:
    return load_file(DATA / folder / file)


def inputs(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("in."): value for name, value in arrays.items() if name.startswith("in.")}


def cases(folder: str) -> list[str]:
    return [case["name"] for case in golden(folder)["cases"]]


def randomise(module: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Give every weight a random value, those that start at zero too; rotary frequencies stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name != "rope.freqs":
                value.normal_(std=std, generator=generator)
