"""A published model: a local folder, or a repository of the hub, with config.json, safetensors and a tokenizer."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common.models.causal_lm.errors import ModelLoadError, UnsupportedModelError
from common.models.causal_lm.model import CausalLM

_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_PIECE_BYTES = 1 << 20


def load(location: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> CausalLM:
    """The model in a folder or hub repository.

    Args:
        dtype: of weights, keys and values; None: as published.

    Raises:
        ModelLoadError: missing or damaged files.
        UnsupportedModelError: an architecture that cannot run over paged attention.
    """
    folder = fetch(location)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"{location}: no readable config.json of a model known here ({error})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{location}: {config.model_type} is no causal language model of the transformers library: "
            "serve one that is, or a newer transformers"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"{location}: its weights cannot be read ({error}): safetensors are needed, as published"
        ) from error
    return CausalLM(model.to(device))


def load_tokenizer(location: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the same place. Raises ModelLoadError if there is none that can be read."""
    folder = fetch(location)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"{location}: no tokenizer that can be read ({error}): put tokenizer.json there"
        ) from error
    if not tokenizer.is_fast:
        raise ModelLoadError(f"{location}: its tokenizer has no tokenizer.json: convert it with transformers first")
    return tokenizer


def weights_digest(location: str | Path) -> str:
    """A hash of all that a model computes with: its configuration and its weights, every byte of them.

    Reads them all, about a gigabyte a second. Raises: ModelLoadError: see ``fetch``; OSError: they cannot be read.
    """
    folder = fetch(location)
    hashed = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        hashed.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE_BYTES):
                hashed.update(piece)
    return hashed.hexdigest()


def fetch(location: str | Path) -> Path:
    """The local folder of a model: itself, or a hub repository's files, downloaded once. Raises ModelLoadError."""
    folder = Path(location)
    if folder.is_dir():
        return folder
    name = str(location)
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ModelLoadError(f"{location}: no such folder; give one with config.json, safetensors and a tokenizer")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name}: neither a folder here nor a hub repository that can be read ({error}); "
            "download it first, or give the path of its folder"
        ) from error
