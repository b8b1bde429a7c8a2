"""The settings of a language instance."""

import tempfile
from enum import StrEnum
from pathlib import Path

from pydantic import Field

from common.mempool.caching import Caching
from common.policies.decode_admission import VictimRule
from common.runtime.settings import ComputeSettings

DEMO = "demo"
_DEMO_NAME = "triptych-demo-language"


class TransferMode(StrEnum):
    """When keys and values leave the prefill instance (MemServe, sections 4 and 6)."""

    BY_REQUEST = "by_request"
    BY_CHUNK = "by_chunk"
    BY_LAYER = "by_layer"


class LengthPrediction(StrEnum):
    """When a prefill instance predicts how long an answer will be (TetriInfer, section 3.3.2).

    ``PARALLEL``: while the prompt is computed, which costs throughput; ``SEQUENTIAL``: before, which costs time.
    """

    OFF = "off"
    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


class KVStore(StrEnum):
    """Whether what is kept goes to the cache stores too, and is looked for there.

    ``ON``: where that is measured to be sooner done than computing. ``ALWAYS``: whatever it takes.
    """

    OFF = "off"
    ON = "on"
    ALWAYS = "always"


class LanguageSettings(ComputeSettings):
    """``language_model``: a local folder, a hub name or ``demo``.

    ``kv_bytes`` is the memory of keys and values. A pass computes at most ``chunk_tokens`` tokens of prompts
    (TetriInfer, section 3.3.3), and at most ``most_sequences`` hold blocks at once. A hand-over that takes longer than
    ``transfer_s`` seconds is given up: its receiver computes the keys and values itself. ``transfer_mode`` says when
    they leave: ``by_request`` all at once after the prompt, ``by_chunk`` whole blocks after each pass, ``by_layer``
    each layer's while later ones are computed. ``kv_checksum`` compares the bytes at both ends. ``caching`` says what
    is kept for later sequences (MemServe, section 5): in what is free of ``kv_bytes``, then in ``kv_dram_bytes`` of the
    host's memory, then in ``kv_disk_bytes`` of a file in ``kv_disk_folder``; and, by ``kv_store``, beginnings of
    ``kv_store_tokens`` tokens at least in the cache stores. ``length_prediction`` says when lengths of
    answers are predicted, ``victim_rule`` who leaves where there are too few blocks for all: who came last, or who is
    predicted to have most tokens yet to come.
    """

    language_model: str = "demo"
    kv_bytes: int = Field(default=256 << 20, ge=1)
    chunk_tokens: int = Field(default=512, ge=1)
    most_sequences: int = Field(default=256, ge=1)
    transfer_s: float = Field(default=10.0, gt=0)
    transfer_mode: TransferMode = TransferMode.BY_CHUNK
    kv_checksum: bool = True
    caching: Caching = Caching.PD_CACHING_3
    kv_dram_bytes: int = Field(default=0, ge=0)
    kv_disk_bytes: int = Field(default=0, ge=0)
    kv_disk_folder: Path = Path(tempfile.gettempdir())
    kv_store: KVStore = KVStore.OFF
    kv_store_tokens: int = Field(default=256, ge=1)
    length_prediction: LengthPrediction = LengthPrediction.PARALLEL
    victim_rule: VictimRule = VictimRule.LATEST


def model_name(location: str) -> str:
    """What clients call the model: a folder's own name, or the hub's."""
    if location == DEMO:
        return _DEMO_NAME
    folder = Path(location)
    return folder.resolve().name if folder.is_dir() else location
