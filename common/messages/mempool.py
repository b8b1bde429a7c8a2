"""What language instances say to one another about the keys and values that they keep (MemServe, section 4)."""

from pydantic import Field

from common.messages.base import Message
from common.messages.tensors import TensorRef


class MatchPrefix(Message):
    """Of how many of these packed ``tokens``, from the first on, do you have keys and values? They count as used."""

    tokens: bytes


class PrefixMatched(Message):
    """Of so many, in whole blocks."""

    tokens: int = Field(ge=0)


class SendPrefix(Message):
    """Send to ``to`` what it lacks of these packed ``tokens`` and you have; answered when it has that.

    How a prompt's instance pulls what another has (MemServe, section 5.3).
    """

    tokens: bytes
    to: str


class BlockAddress(Message):
    """One block of whoever is asked, as it was when it had been given out ``epoch`` times."""

    medium: int
    block: int
    epoch: int


class MoveBlocks(Message):
    """Fetch these blocks; answered when they are there, and found in the index if they are to be.

    ``kv`` has one tensor [blocks, ...] for each run of neighbours. ``checksums`` are the CRC-32 of the blocks in order,
    None where one is not known; none at all: they are not to be compared. ``into`` are blocks that the sender may write
    to; without it, whoever receives allocates them, in its host's memory if ``dram``. ``private`` is for the receiver's
    engine.

    With ``tokens`` (packed, whole blocks) they are those of the tokens from block ``first_block`` on, and are inserted.
    Then whoever has not what comes before refuses with ``no_parent``, and nothing is fetched by whoever has all.
    """

    source: str
    block_tokens: int = Field(ge=1)
    kv: tuple[TensorRef, ...]
    checksums: tuple[int | None, ...] = ()
    into: tuple[BlockAddress, ...] = ()
    dram: bool = False
    private: bytes = b""
    tokens: bytes = b""
    first_block: int = Field(default=0, ge=0)


class BlocksMoved(Message):
    """Where they are now; nowhere if all were there already."""

    addresses: tuple[BlockAddress, ...] = ()
