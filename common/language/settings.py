"""The settings of a language instance."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.mempool.caching import Caching
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission, VictimRule
from common.policies.language.decode_dispatch import DispatchRule
from common.policies.language.prefill_schedule import PrefillOrder
from common.runtime.settings import ComputeSettings

DEMO = "demo"
_DEMO_NAME = "triptych-demo-language"


class TransferMode(StrEnum):
    """When keys and values leave the prefill instance (MemServe, figure 5)."""

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


class Batching(StrEnum):
    """Whether sequences come in at every pass, or in batches of which all must end first (a baseline)."""

    CONTINUOUS = "continuous"
    FIXED = "fixed"


class LanguageSettings(ComputeSettings):
    """``language_model``: a local folder, a hub name or ``demo``.

    ``kv_bytes`` is the memory of keys and values. A pass computes at most ``chunk_tokens`` tokens of prompts
    (TetriInfer, section 3.3.3), and at most ``most_sequences`` hold blocks at once. A hand-over that takes longer than
    ``transfer_s`` seconds is given up: its receiver computes the keys and values itself. ``transfer_mode`` says when
    they leave: ``by_request`` all at once after the prompt, ``by_chunk`` whole blocks after each pass, ``by_layer``
    each layer's while later ones are computed. ``kv_checksum`` compares the bytes at both ends. ``caching`` says what
    is kept for later sequences (MemServe, figure 4): in what is free of ``kv_bytes``, then in ``kv_dram_bytes`` of the
    host's memory, then in ``kv_disk_bytes`` of a file in ``kv_disk_folder``; and, by ``kv_store``, beginnings of
    ``kv_store_tokens`` tokens at least in the cache stores. ``length_prediction`` says when lengths of
    answers are predicted, ``victim_rule`` who leaves where there are too few blocks for all: who came last, or who is
    predicted to have most tokens yet to come.

    ``dispatch`` says by which rule a prefill instance chooses who decodes (TetriInfer, section 3.3.4); ``scheduler``:
    it does not, the scheduler does. ``least_delay`` reckons with ``delay_sequence_ms`` for a sequence more in a step,
    ``delay_heavy_ms`` beyond that for one with many tokens, and a link for the keys and values of ``transfer_tokens_s``
    tokens a second; the defaults are the paper's machine's (OPT-13B on two V100).

    How a pass is put together: ``prefill_order`` says whose prompt comes next, sorted ``prefill_sched_batch`` at a time
    (TetriInfer, section 3.3.1); with ``srf``, which has no batches, a second of waiting counts as
    ``prefill_ageing_tokens_s`` tokens less. Of a prompt that waits alone a pass may compute ``alone_tokens`` (0:
    ``chunk_tokens``). ``decode_admission`` says who is given blocks (section 3.4). With ``batching`` fixed a batch is
    of ``fixed_batch`` sequences at most, and no other comes in before all of it are at their end.
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
    dispatch: Literal["scheduler"] | DispatchRule = "scheduler"
    delay_sequence_ms: float = Field(default=0.54, ge=0)
    delay_heavy_ms: float = Field(default=0.29, ge=0)
    transfer_tokens_s: float = Field(default=20_000.0, gt=0)
    prefill_order: PrefillOrder = PrefillOrder.FCFS
    prefill_sched_batch: int = Field(default=16, ge=1)
    prefill_ageing_tokens_s: float = Field(default=100.0, ge=0)
    alone_tokens: int = Field(default=0, ge=0)
    decode_admission: AdmissionRule = AdmissionRule.GREEDY
    batching: Batching = Batching.CONTINUOUS
    fixed_batch: int = Field(default=16, ge=1)

    @property
    def batch_sequences(self) -> int:
        """So many sequences hold blocks at most."""
        return self.fixed_batch if self.batching is Batching.FIXED else self.most_sequences

    @property
    def batching_rules(self) -> BatchingRules:
        return BatchingRules(
            alone_tokens=self.alone_tokens,
            order=self.prefill_order,
            batch=self.prefill_sched_batch,
            ageing=self.prefill_ageing_tokens_s,
            admission=DecodeAdmission(self.decode_admission, self.victim_rule),
            fixed=self.batching is Batching.FIXED,
        )

    @property
    def dispatch_rule(self) -> DispatchRule:
        """By which to choose where a route names nobody."""
        return DispatchRule.POWER_OF_TWO if self.dispatch == "scheduler" else self.dispatch


def model_name(location: str) -> str:
    """What clients call the model: a folder's own name, or the hub's."""
    if location == DEMO:
        return _DEMO_NAME
    folder = Path(location)
    return folder.resolve().name if folder.is_dir() else location
