"""The cache store: tensors kept for others under a key, the newest version of each.

Control only. To store, the asker exports the tensor and the cache store fetches it; to load, it is the other way round.
"""

from pydantic import Field

from common.messages.base import Message
from common.messages.tensors import TensorRef


class StoreTensor(Message):
    """Keep ``tensor`` under ``key``, unless what is kept there is as new. The asker exports it for one fetch.

    ``tensor_version`` grows with every store under the key. Until ``pin_s`` seconds from now it is not evicted, only
    dropped or replaced; a pin runs out by itself, so that what nobody drops does not stay for ever.
    """

    key: str
    tensor_version: int = Field(ge=0)
    tensor: TensorRef
    pin_s: float = 0.0


class TensorStored(Message):
    """What is kept under ``key`` now. Not ``stored``: that was as new as the one offered, which nobody fetched."""

    key: str
    tensor_version: int
    stored: bool


class FindTensor(Message):
    """Which version is kept under ``key``, exported for ``uses`` fetches (0: only the version is asked for)."""

    key: str
    uses: int = Field(default=1, ge=0)


class TensorFound(Message):
    """The version kept under ``key``, and the tensor where it was asked for; without a version: there is none."""

    key: str
    tensor_version: int | None = None
    tensor: TensorRef | None = None


class DropTensor(Message):
    """Forget what is kept under ``key``, if anything is."""

    key: str
