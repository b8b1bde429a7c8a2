"""The parts of an instance's batching, by their names: what a live instance is set up with, and a simulated one."""

from dataclasses import dataclass, field

from common.policies.language.continuous_batching import ContinuousBatching
from common.policies.language.decode_admission import DecodeAdmission
from common.policies.language.prefill_schedule import PrefillOrder, PrefillSchedule


@dataclass(frozen=True, slots=True)
class BatchingRules:
    """How one instance batches; what is left out is vLLM's way.

    Attributes:
        alone_tokens, admission, fixed: see ``ContinuousBatching``.
        order, batch, ageing, merges_batches: see ``PrefillSchedule``.
    """

    alone_tokens: int = 0
    order: PrefillOrder = PrefillOrder.FCFS
    batch: int = 16
    ageing: float = 0.0
    merges_batches: bool = True
    admission: DecodeAdmission = field(default_factory=DecodeAdmission)
    fixed: bool = False

    def batching(
        self, blocks: int, block_tokens: int, chunk_tokens: int = 512, most_sequences: int = 256
    ) -> ContinuousBatching:
        """A new instance's; see ``ContinuousBatching`` for the numbers."""
        return ContinuousBatching(
            blocks,
            block_tokens,
            chunk_tokens,
            most_sequences,
            self.alone_tokens,
            PrefillSchedule(self.order, self.batch, self.ageing, self.merges_batches),
            self.admission,
            self.fixed,
        )
