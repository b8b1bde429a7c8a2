"""What the control bus promises, and the values it hands out. ``NatsBus`` keeps the promise."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from common.messages.base import Message
from common.messages.subjects import (
    Body,
    Bucket,
    EventSubject,
    ObjectBucket,
    Reply,
    Request,
    RequestSubject,
    WorkQueue,
)

RequestHandler = Callable[[Request], Awaitable[Reply]]
EventHandler = Callable[[Body], Awaitable[None] | None]
Value = TypeVar("Value", bound=Message, covariant=True)


@dataclass(frozen=True)
class Entry(Generic[Value]):
    """A key of a bucket and its value. ``revision`` grows with every write to the bucket."""

    key: str
    value: Value
    revision: int


@dataclass(frozen=True)
class Change(Generic[Value]):
    """What a watch saw. ``value`` is None where the key was deleted.

    ``revision`` is the change's own, except for a deletion that happened while the watch was cut off from the broker:
    there it is the revision last seen.
    """

    key: str
    value: Value | None
    revision: int


@dataclass(frozen=True)
class CaughtUp:
    """Comes once in a watch: what was there at its start has been seen, everything after this is live."""


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object. ``sha256`` is in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


class Subscription(Protocol):
    """A running handler."""

    async def stop(self, deadline_s: float | None = None) -> None:
        """Hear nothing new, let the running handlers end; whatever runs past the deadline is cancelled."""


class Hearing(Subscription, Protocol):
    """A running handler of events."""

    async def caught_up(self, deadline_s: float | None = None) -> None:
        """Return once the handler is done with all that had arrived before this call.

        That includes what somebody published before answering a request of this bus, once the answer is here.

        Raises:
            DeadlineExceeded: it is not.
        """


class Taken(Protocol[Value]):
    """A job from a queue, ours until it is settled or until the queue's acknowledgement wait has passed.

    Each of the four is confirmed by the broker. The first of ``ack``, ``nak`` and ``term`` settles the job.
    """

    @property
    def body(self) -> Value: ...

    @property
    def job_id(self) -> str: ...

    @property
    def attempt(self) -> int:
        """How often the job has been handed out, this time included: 1 at first."""

    async def ack(self) -> None:
        """Done: the job leaves the queue."""

    async def nak(self, delay_s: float = 0.0) -> None:
        """Not done: hand it out again, after ``delay_s`` seconds."""

    async def in_progress(self) -> None:
        """Still at it: the acknowledgement wait starts anew."""

    async def term(self) -> None:
        """Cannot be done: the job leaves the queue."""


class Watch(Protocol[Value]):
    """An iterator over a bucket's changes: the present values, ``CaughtUp``, then every change as it comes.

    It outlives the connection: what changed meanwhile comes after the reconnect, keys deleted meanwhile included. Of
    several changes to one key in quick succession only the last is certain to be seen. Values that cannot be read are
    logged and left out. Ends when it is stopped or the bus is closed.
    """

    def __aiter__(self) -> AsyncIterator[Change[Value] | CaughtUp]: ...

    async def __anext__(self) -> Change[Value] | CaughtUp: ...

    async def stop(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


class Bus(Protocol):
    """Control between the processes of the house.

    Every wait has a deadline in seconds; where none is given, the one set at connecting holds. All methods raise
    ``BusUnavailable`` when the broker is away until the deadline, ``DeadlineExceeded`` when it is there but the answer
    is not, ``NotPrepared`` for a queue or bucket that does not exist, and ``BadAddress`` for tokens, keys and names
    that cannot stand in a subject.
    """

    @property
    def connected(self) -> bool: ...

    async def prepare(
        self,
        *,
        queues: Sequence[WorkQueue[Any]] = (),
        buckets: Sequence[Bucket[Any]] = (),
        object_buckets: Sequence[ObjectBucket] = (),
        ack_wait_s: float = 30.0,
        replicas: int = 1,
        deadline_s: float | None = None,
    ) -> None:
        """Create what is missing, bring the rest up to date. Any number of processes may do so at once.

        ``ack_wait_s``: a job neither settled nor reported in progress for so long is handed out again.

        Raises:
            CannotPrepare: the broker refused; the text says what to change.
        """

    # --- request and reply ---

    async def request(
        self, subject: RequestSubject[Request, Reply], request: Request, *tokens: str, deadline_s: float | None = None
    ) -> Reply:
        """Ask and wait for the answer.

        Raises:
            RemoteFailure: the handler refused, or failed.
            NobodyThere: nobody serves the subject.
            BadReply: the answer is not a ``Reply``.
        """

    async def serve(
        self,
        subject: RequestSubject[Request, Reply],
        handler: RequestHandler[Request, Reply],
        *tokens: str,
        queue_group: str | None = None,
        max_in_flight: int = 64,
    ) -> Subscription:
        """Answer requests, at most ``max_in_flight`` at a time; the others wait their turn.

        A handler that raises ``Refusal`` answers with its failure. Any other exception is logged and answered as
        ``Failure(code="internal")``, unreadable bytes as ``Failure(code="bad_message")``. With ``queue_group``, each
        request goes to one member of the group.
        """

    # --- events ---

    async def publish(self, subject: EventSubject[Body], body: Body, *tokens: str) -> None:
        """Tell whoever listens. Never waits for the broker: cut off from it, a few megabytes are kept for its return,
        and what does not fit is dropped and logged."""

    async def subscribe(
        self, subject: EventSubject[Body], handler: EventHandler[Body], *tokens: str, max_pending: int = 4096
    ) -> Hearing:
        """Hear events one after another, in order; without ``tokens``, about everyone.

        More than ``max_pending`` waiting are dropped and logged. A handler's exception is logged, and the next event
        comes.
        """

    # --- work queues ---

    async def enqueue(
        self, queue: WorkQueue[Body], body: Body, job_id: str, *, deadline_s: float | None = None
    ) -> bool:
        """Store a job for one taker. False: the queue holds ``job_id`` already, or did within the last two minutes,
        and nothing was added.

        Raises:
            QueueFull: the queue has reached ``max_messages``.
        """

    async def take(self, queue: WorkQueue[Body], deadline_s: float | None = None) -> Taken[Body] | None:
        """The oldest job nobody has; None when there is none until the deadline."""

    async def queue_depth(self, queue: WorkQueue[Body], *, deadline_s: float | None = None) -> int:
        """How many jobs are stored, the taken but unsettled ones included."""

    async def queued(self, queue: WorkQueue[Body], job_id: str, *, deadline_s: float | None = None) -> bool:
        """Whether the job is stored, taken or not."""

    async def remove(self, queue: WorkQueue[Body], job_id: str, *, deadline_s: float | None = None) -> bool:
        """Remove the job, taken or not. False: it was not there."""

    # --- buckets ---

    async def get(self, bucket: Bucket[Body], key: str, *, deadline_s: float | None = None) -> Entry[Body]:
        """The latest value.

        Raises:
            KeyMissing: there is none.
            BadReply: the stored bytes are not the bucket's message.
        """

    async def create(self, bucket: Bucket[Body], key: str, value: Body, *, deadline_s: float | None = None) -> int:
        """Write a key that has no value; its revision.

        Raises:
            KeyExists: it has one.
            StorageFull: the bucket is full.
        """

    async def replace(
        self, bucket: Bucket[Body], key: str, value: Body, revision: int, *, deadline_s: float | None = None
    ) -> int:
        """Write a key whose latest revision is ``revision``; its new one.

        Raises:
            WrongRevision: somebody else wrote or deleted it first.
            StorageFull: the bucket is full.
        """

    async def put(self, bucket: Bucket[Body], key: str, value: Body, *, deadline_s: float | None = None) -> int:
        """Write a key whatever it holds; its revision.

        Raises:
            StorageFull: the bucket is full.
        """

    async def delete(
        self, bucket: Bucket[Body], key: str, revision: int | None = None, *, deadline_s: float | None = None
    ) -> None:
        """Delete a key; with ``revision``, only if that is its latest. Deleting a missing key without one is fine.

        Raises:
            WrongRevision: somebody else wrote or deleted it first.
        """

    async def keys(self, bucket: Bucket[Body], *, deadline_s: float | None = None) -> list[str]:
        """Every key that has a value, oldest write first."""

    async def entries(self, bucket: Bucket[Body], *, deadline_s: float | None = None) -> list[Entry[Body]]:
        """Every key and value in one pass, oldest write first. Values that cannot be read are logged, left out."""

    def watch(self, bucket: Bucket[Body], key: str | None = None) -> Watch[Body]:
        """Follow one key or the whole bucket."""

    # --- objects ---

    async def put_object(
        self,
        bucket: ObjectBucket,
        name: str,
        chunks: AsyncIterable[bytes] | bytes,
        *,
        deadline_s: float | None = None,
    ) -> ObjectInfo:
        """Store a file as its chunks come. It is seen whole or not at all: a failed or cancelled put leaves the
        object of that name as it was. The deadline holds for each exchange with the broker, not for the whole.

        Raises:
            StorageFull: the bucket is full.
        """

    def get_object(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> AsyncIterator[bytes]:
        """The file, chunk by chunk; the deadline holds for each.

        Raises:
            ObjectMissing: there is none of that name.
            ObjectDamaged: at the end, if size or SHA-256 do not match.
        """

    async def object_info(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> ObjectInfo:
        """Raises: ObjectMissing."""

    async def delete_object(self, bucket: ObjectBucket, name: str, *, deadline_s: float | None = None) -> None:
        """Raises: ObjectMissing."""

    # --- the end ---

    async def drain(self, deadline_s: float | None = None) -> None:
        """Hear nothing new, let running handlers end, send what is waiting, then close."""

    async def close(self) -> None:
        """Cancel running handlers and leave at once."""
