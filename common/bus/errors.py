"""Everything that can go wrong on the bus, in one tree."""

from common.messages.failures import Failure


class BusError(Exception):
    """Base of all errors of the bus."""


class BusUnavailable(BusError):
    """The broker could not be reached, or JetStream could not answer, before the deadline.

    A write that was under way when the connection broke may or may not have been stored.
    """


class DeadlineExceeded(BusError):
    """The broker is there, but the answer did not come in time."""


class NobodyThere(BusError):
    """Nobody serves the subject."""


class BadAddress(BusError, ValueError):
    """A token, key or name that cannot stand in a subject, or a wrong number of them."""


class BadReply(BusError):
    """The answer is not the message that the subject promises."""


class NotPrepared(BusError):
    """The queue or bucket does not exist; ``prepare`` creates it."""


class CannotPrepare(BusError):
    """The broker refused to create or change a queue or bucket."""


class StorageFull(BusError):
    """The bucket has reached its ``max_bytes``, or the broker its disk limit: nothing was stored."""


class QueueFull(BusError):
    """The queue holds as many messages as it may: nothing was stored."""


class WrongRevision(BusError):
    """The compare-and-set lost: the key is no longer at the ``expected`` revision (or is gone)."""

    def __init__(self, key: str, expected: int) -> None:
        super().__init__(f"{key} is no longer at revision {expected}; read it again and decide anew")
        self.key = key
        self.expected = expected


class KeyMissing(BusError):
    """The bucket has no value under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no value under key {key!r}")
        self.key = key


class KeyExists(BusError):
    """The bucket has a value under this key already."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} has a value already")
        self.key = key


class ObjectMissing(BusError):
    """The object store has no object of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no object named {name!r}")
        self.name = name


class ObjectDamaged(BusError):
    """What was read is not what was stored (size or SHA-256 differ), or it was replaced while being read."""


class RemoteFailure(BusError):
    """The one who was asked answered with a typed failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.stage}: {failure.code}: {failure.message}")
        self.failure = failure


class Refusal(Exception):
    """Raised by a request handler to answer with ``failure`` instead of a reply."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.stage}: {failure.code}: {failure.message}")
        self.failure = failure
