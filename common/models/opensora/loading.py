"""Checkpoints in and out: a folder, or a hub repository, with config.json and safetensors weights.

The key names must be exactly the model's own. Weights may be stored in half precision; they are cast when read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.models.opensora.errors import ModelLoadError
from common.models.opensora.stdit3 import STDiT3, STDiT3Config
from common.models.opensora.vae import OpenSoraVAE
from common.models.opensora.vae_config import OpenSoraVAEConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Half precision would move the positions (rotary frequencies span four decades) and the colours.
_KEEP_FLOAT32 = frozenset({"rope.freqs", "scale", "shift"})

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def load_stdit3(location: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> STDiT3:
    """The transformer in a folder or hub repository, in eval mode. Raises ModelLoadError."""
    folder = fetch(location)
    return _load(STDiT3, read_stdit3_config(folder), folder, device, dtype)


def load_vae(location: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> OpenSoraVAE:
    """The autoencoder in a folder or hub repository, in eval mode. Raises ModelLoadError."""
    folder = fetch(location)
    return _load(OpenSoraVAE, read_vae_config(folder), folder, device, dtype)


def read_stdit3_config(folder: Path) -> STDiT3Config:
    """The transformer's configuration alone."""
    return _read_config(folder, STDiT3Config.from_dict)


def read_vae_config(folder: Path) -> OpenSoraVAEConfig:
    """The autoencoder's configuration alone."""
    return _read_config(folder, OpenSoraVAEConfig.from_dict)


def save_stdit3(model: STDiT3, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, the weights in `dtype` if one is given."""
    _save(model, model.config.to_dict(), folder, dtype)


def save_vae(model: OpenSoraVAE, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, the weights in `dtype` if one is given."""
    _save(model, model.config.to_dict(), folder, dtype)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Give a model its weights in `dtype`, in place, as far as loading it would."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                value.data = value.data.to(_stored_type(name, dtype))
    return model


def fetch(location: str | Path, config_only: bool = False) -> Path:
    """The local folder of a model part: itself, or a hub repository's files, downloaded once."""
    folder = Path(location)
    if folder.is_dir():
        return folder
    name = str(location)
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ModelLoadError(f"{location}: no such folder; give a folder with {CONFIG} and {WEIGHTS}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [CONFIG] if config_only else [CONFIG, "*.safetensors", WEIGHTS_INDEX]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name}: neither a folder here nor a hub repository that can be read ({error}); "
            "download it first, or give the path of its folder"
        ) from error


def _read_config(folder: Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing: a model part is a folder with {CONFIG} and {WEIGHTS}")
    try:
        return parse(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _load(
    build: Callable[[Config], Model], config: Config, folder: Path, device: str | torch.device, dtype: torch.dtype
) -> Model:
    with torch.device("meta"):
        model = build(config)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            part = load_file(file, device=str(device))
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file}: not a readable safetensors file ({error})") from error
        for name, value in part.items():
            weights[name] = value.to(_stored_type(name, dtype)) if value.is_floating_point() else value
    _check_keys(folder, model.state_dict(), weights)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _stored_type(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name in _KEEP_FLOAT32 else dtype


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModelLoadError(f"{index}: no readable weight_map ({error!r})") from error
        files = [folder / str(name) for name in names]
    else:
        files = [folder / WEIGHTS]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(f"weights are missing: {', '.join(missing)}")
    return files


def _check_keys(folder: Path, expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    problems = []
    for what, names in (("missing", set(expected) - set(weights)), ("unexpected", set(weights) - set(expected))):
        if names:
            problems.append(f"{len(names)} {what} keys: {_some(sorted(names))}")
    shapes = [
        f"{name} is {list(weights[name].shape)}, the configuration makes it {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} wrong shapes: {_some(shapes)}")
    if problems:
        raise ModelLoadError(f"{folder}: the weights do not fit the configuration; {'; '.join(problems)}")


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _save(model: nn.Module, config: dict[str, object], folder: Path, dtype: torch.dtype | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    weights = {}
    for name, value in model.state_dict().items():
        cast = dtype is not None and value.is_floating_point() and name not in _KEEP_FLOAT32
        weights[name] = (value.to(dtype) if cast else value).contiguous().cpu()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
