"""The cache stores: tensors kept for others under a key, the newest version of each; every store has all of them.

Control only. To store, the asker exports the tensor and the cache store fetches it; to load, it is the other way round.
What has one version for ever, such as KV blocks, is asked for in batches.
"""

from pydantic import Field

from common.messages.base import Message
from common.messages.tensors import TensorRef

MAX_BATCH = 1024
"""Keys in one batch."""


class StoreTensor(Message):
    """Keep ``tensor`` under ``key``, unless what is kept there is as new. The asker exports it for one fetch.

    ``tensor_version`` grows with every store under the key. Until ``pin_s`` seconds from now it is not evicted, only
    dropped or replaced; a pin runs out by itself, so that what nobody drops does not stay for ever. ``copies``: in so
    many cache stores it lies when this is answered, or in all that are in reach.
    """

    key: str
    tensor_version: int = Field(ge=0)
    tensor: TensorRef
    pin_s: float = 0.0
    copies: int = Field(default=1, ge=1)


class TensorStored(Message):
    """What is kept under ``key`` now (-1: nothing). Not ``stored``: that was as new as the one offered, or a copy was
    not wanted; nobody fetched it then.

    ``copies``: in how many cache stores it lies for certain.
    """

    key: str
    tensor_version: int
    stored: bool
    copies: int = 1


class FindTensor(Message):
    """Which version is kept under ``key``, exported for ``uses`` fetches (0: only the version is asked for).

    ``above``: only the tensor of a version above it is of use; of others nothing is exported.
    """

    key: str
    uses: int = Field(default=1, ge=0)
    above: int | None = None


class TensorFound(Message):
    """The version kept under ``key``, and the tensor where it was asked for; without a version: there is none."""

    key: str
    tensor_version: int | None = None
    tensor: TensorRef | None = None


class DropTensor(Message):
    """Forget what is kept under ``key``, if anything is."""

    key: str


# --- in batches, for what has one version for ever ---------------------------------------------------------------


class StoreTensors(Message):
    """Keep ``tensor[i]`` under ``keys[i]``, unless something is kept there. The asker exports it for one fetch.

    ``checksums``: the CRC-32 of each, for whoever finds it; none: it is not to be compared. What begins the batch goes
    last when room is needed.
    """

    keys: tuple[str, ...] = Field(max_length=MAX_BATCH)
    tensor: TensorRef
    checksums: tuple[int, ...] = Field(default=(), max_length=MAX_BATCH)


class TensorsStored(Message):
    """How many were new and are kept now. Fewer than were new where there is no room for all."""

    stored: int


class HaveTensors(Message):
    """Which of ``keys`` are kept. They count as used, the first one as the last."""

    keys: tuple[str, ...] = Field(max_length=MAX_BATCH)


class TensorsHad(Message):
    """For each key asked for, whether something is kept."""

    had: tuple[bool, ...]


class FindTensors(Message):
    """The tensors kept under ``keys``, each part exported for one fetch. All of one call are of one shape and dtype.

    ``most_bytes``: of one part; what does not fit is not looked for. ``leading``: only what comes before the first that
    is not found is of use. ``wait_s``: for so long from now on the asker waits, the fetches included; None: it does not
    say.
    """

    keys: tuple[str, ...] = Field(max_length=MAX_BATCH)
    most_bytes: int = Field(ge=0)
    leading: bool = False
    wait_s: float | None = None


class TensorsPart(Message):
    """``tensor[i]`` is what is kept under the key at place ``places[i]`` of those asked for.

    ``checksums``: of each, as they were stored; None where none was.
    """

    places: tuple[int, ...]
    tensor: TensorRef
    checksums: tuple[int | None, ...] = ()


class TensorsFound(Message):
    """A part from each cache store that had some of them; what is in no part, is not kept."""

    parts: tuple[TensorsPart, ...] = ()


class DropTensors(Message):
    """Forget what is kept under ``keys``."""

    keys: tuple[str, ...] = Field(max_length=MAX_BATCH)


# --- between cache stores ----------------------------------------------------------------------------------------


class CopyTensor(Message):
    """Keep this too, as it is kept by the asker, who exports it for one fetch. Times are Unix seconds.

    ``spare``: not if anything had to be evicted for it. ``checksum``: its CRC-32, where it was stored with one.
    """

    key: str
    tensor_version: int = Field(ge=0)
    tensor: TensorRef
    stored_at_s: float
    pinned_until_s: float
    spare: bool = False
    checksum: int | None = None


class DropCopy(Message):
    """``key`` was dropped at ``dropped_at_s`` (Unix seconds): forget what was stored under it until then."""

    key: str
    dropped_at_s: float


class AskDigests(Message):
    """What is kept, in digests."""


class Digests(Message):
    """For each bucket of keys, a digest of the keys and versions kept."""

    digests: tuple[int, ...]


class ListBucket(Message):
    """What is kept of the keys in one bucket."""

    bucket: int


class BucketListed(Message):
    """The keys of the bucket and their versions."""

    versions: dict[str, int]
