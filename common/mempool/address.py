"""Where a block of keys and values lies, and how much one holds."""

from enum import IntEnum, StrEnum
from typing import NamedTuple

BLOCK_TOKENS = 16
TOKEN_BYTES = 4
# Of one block's tokens, packed (``common.messages.chat.pack_tokens``).
KEY_BYTES = BLOCK_TOKENS * TOKEN_BYTES


class Medium(IntEnum):
    """The tiers of an instance's memory, the warmest first. Only what is in ``HBM`` can be computed with."""

    HBM = 0
    DRAM = 1
    DISK = 2


class MemoryType(StrEnum):
    """What ``alloc_mem`` may give (MemServe, table 1)."""

    HBM_ONLY = "hbm_only"
    DRAM_ONLY = "dram_only"
    MIXED = "mixed"


class Address(NamedTuple):
    """One block. ``epoch`` counts how often it has been given out, so that an address from an earlier life is told."""

    instance: str
    medium: Medium
    block: int
    epoch: int
