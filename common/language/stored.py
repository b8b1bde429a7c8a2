"""An instance's side of the cache stores: what it keeps goes there, what it lacks of a prompt is looked for there."""

from common.language.finding import FindingPrefixes
from common.language.held import Held
from common.language.settings import KVStore, LanguageSettings
from common.language.stepper import Stepper
from common.language.storing import StoringPrefixes
from common.language.worth import Worth
from common.mempool.address import BLOCK_TOKENS, TOKEN_BYTES
from common.mempool.pool import MemPool
from common.mempool.store_client import StoreClient
from common.mempool.transfer import BlockTransfer
from common.runtime.worker import Equipment


class StoredPrefixes:
    """``storing`` and ``finding``, which decide by the same measurements.

    Args:
        namespace: of the model's keys and values; empty: nothing goes there, and nothing is looked for.
    """

    def __init__(
        self,
        equipment: Equipment,
        memory: MemPool,
        transfers: BlockTransfer,
        stepper: Stepper,
        settings: LanguageSettings,
        namespace: str,
    ) -> None:
        mode = settings.kv_store if namespace else KVStore.OFF
        token_bytes = memory.hbm.memory[0].nbytes // BLOCK_TOKENS
        worth = Worth(mode, token_bytes, settings.kv_store_tokens, settings.transfer_s)
        stepper.computed = worth.computed
        client = StoreClient(equipment.bus, equipment.tensors)
        self.storing = StoringPrefixes(client, memory, stepper, worth, namespace)
        self.finding = FindingPrefixes(client, memory, transfers, stepper, worth, namespace, settings.kv_checksum)

    def told(self, held: Held, last: bool) -> None:
        """A token was computed. Then the prompt is kept, and after the last one the answer.

        What was handed over was kept, and so stored, where it came from.
        """
        first = held.generated == held.request.generated + 1 and not held.prefill
        if first or last:
            self.storing.later(held.request.request_id, held.tokens[: TOKEN_BYTES * held.kv_tokens])
