"""How a message speaks of a tensor: by reference. The bytes themselves travel over UCX."""

from pydantic import Field

from common.messages.base import Message


class TensorRef(Message):
    """A tensor that ``owner`` keeps for the receiver to fetch.

    ``address`` is the owner's UCX worker address, so a fetch needs no look-up. ``tensor_id`` is unique within one
    life of the owner; an owner that restarts has another address and answers nothing for its former life's ids.
    """

    owner: str
    tensor_id: int
    address: bytes
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int = Field(ge=0)
