"""The settings of a language instance."""

from enum import StrEnum
from pathlib import Path

from pydantic import Field

from common.runtime.settings import ComputeSettings

DEMO = "demo"
_DEMO_NAME = "triptych-demo-language"


class TransferMode(StrEnum):
    """When keys and values leave the prefill instance (MemServe, sections 4 and 6)."""

    BY_REQUEST = "by_request"
    BY_CHUNK = "by_chunk"
    BY_LAYER = "by_layer"


class LanguageSettings(ComputeSettings):
    """``language_model``: a local folder, a hub name or ``demo``.

    ``kv_bytes`` is the memory of keys and values. A pass computes at most ``chunk_tokens`` tokens of prompts
    (TetriInfer, section 3.3.3), and at most ``most_sequences`` hold blocks at once. A hand-over that takes longer than
    ``transfer_s`` seconds is given up: its receiver computes the keys and values itself. ``transfer_mode`` says when
    they leave: ``by_request`` all at once after the prompt, ``by_chunk`` whole blocks after each pass, ``by_layer``
    each layer's while later ones are computed. ``kv_checksum`` compares the bytes at both ends.
    """

    language_model: str = "demo"
    kv_bytes: int = Field(default=256 << 20, ge=1)
    chunk_tokens: int = Field(default=512, ge=1)
    most_sequences: int = Field(default=256, ge=1)
    transfer_s: float = Field(default=10.0, gt=0)
    transfer_mode: TransferMode = TransferMode.BY_CHUNK
    kv_checksum: bool = True


def model_name(location: str) -> str:
    """What clients call the model: a folder's own name, or the hub's."""
    if location == DEMO:
        return _DEMO_NAME
    folder = Path(location)
    return folder.resolve().name if folder.is_dir() else location
