"""What happens to chats and their instances, as ``chat_dispatch`` is told it, and the routes that it answers with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages.cluster import LanguageRole
from common.policies.language.routing import Pull

# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """A language worker takes sequences. ``kv_tokens``: how many it has room for."""

    instance: str
    roles: tuple[LanguageRole, ...]
    kv_tokens: int = 1 << 20


@dataclass(frozen=True, slots=True)
class RolesChanged:
    """It takes other sequences from now on; what it has, it has still."""

    instance: str
    roles: tuple[LanguageRole, ...]


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """It takes no new ones; what it has goes on."""

    instance: str


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """It is gone with all it had."""

    instance: str


@dataclass(frozen=True, slots=True)
class ChatArrived:
    """A sequence waits for a route: a new one, or one that lost its former route, which this one takes the place of.

    ``created_s``: when its client asked; of what waits, the oldest goes first. ``avoid``: instances to be taken only
    where there is no other. ``cached``: how many tokens of the prompt's beginning instances have. ``conversation``:
    requests of one conversation carry the same; empty: it is one of its own.
    """

    request_id: str
    gateway: str
    created_s: float
    prompt_tokens: int
    max_tokens: int
    avoid: tuple[str, ...] = ()
    cached: Mapping[str, int] = field(default_factory=dict)
    conversation: str = ""


@dataclass(frozen=True, slots=True)
class PrefixPulled:
    """What the sequence was to pull is there, or will not come; ``tokens``: how many were sent."""

    request_id: str
    epoch: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ChatPrefilled:
    """The sequence's first token has come. ``decode``: who goes on with it now; empty: that is not known.

    Said again when somebody else does, and once another than ``prefill`` has (``decoding``).
    """

    request_id: str
    epoch: int
    decode: str = ""
    decoding: bool = False


@dataclass(frozen=True, slots=True)
class ChatEnded:
    """The sequence, or its waiting, is over. ``epoch`` None: whatever route it has, or waits for."""

    request_id: str
    epoch: int | None


@dataclass(frozen=True, slots=True)
class GatewayHolds:
    """All routes that this gateway has, by their epochs. The news that another has ended was lost."""

    gateway: str
    epochs: frozenset[int]


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """Nobody waits any more for what this gateway held."""

    gateway: str


Event = (
    InstanceJoined
    | RolesChanged
    | InstanceDraining
    | InstanceLost
    | ChatArrived
    | PrefixPulled
    | ChatPrefilled
    | ChatEnded
    | GatewayHolds
    | GatewayLost
)

# --- decisions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteSequence:
    """Have the sequence prefilled at ``prefill`` and decoded at ``decode``, once ``prefill`` has what it is to pull.

    ``decode`` empty: ``prefill`` chooses.
    """

    request_id: str
    epoch: int
    prefill: str
    decode: str
    reason: str
    pull: Pull | None = None
