"""How decode instances are: what they report, and what all prefill instances are told (TetriInfer, section 3.2)."""

from pydantic import Field

from common.messages.base import Message


class DecodeLoad(Message):
    """One instance. ``free_blocks``: what those that wait there will take is not free, so it may be below 0.

    ``heavy`` and ``light`` are how many sequences it decodes, or is about to, by whether many tokens are predicted.
    """

    instance: str
    free_blocks: int
    heavy: int = Field(ge=0)
    light: int = Field(ge=0)


class DecodeLoads(Message):
    """All that take new sequences, as they said last."""

    loads: tuple[DecodeLoad, ...]
