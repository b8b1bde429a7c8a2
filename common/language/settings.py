"""The settings of a language instance."""

from pydantic import Field

from common.runtime.settings import ComputeSettings


class LanguageSettings(ComputeSettings):
    """``language_model``: a local folder, a hub name or ``demo``.

    ``kv_bytes`` is the memory of keys and values. A pass computes at most ``chunk_tokens`` tokens of prompts
    (TetriInfer, section 3.3.3), and at most ``most_sequences`` hold blocks at once. A hand-over that takes longer than
    ``transfer_s`` seconds is given up: its receiver computes the keys and values itself. ``kv_checksum`` compares the
    bytes at both ends.
    """

    language_model: str = "demo"
    kv_bytes: int = Field(default=256 << 20, ge=1)
    chunk_tokens: int = Field(default=512, ge=1)
    most_sequences: int = Field(default=256, ge=1)
    transfer_s: float = Field(default=10.0, gt=0)
    kv_checksum: bool = True
