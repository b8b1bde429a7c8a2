"""How queues, buckets and object stores lie in JetStream: the broker's own formats, so that its tools can read them."""

from typing import Any

from common.bus.errors import CannotPrepare
from common.bus.jetstream import JetStream, Rejected
from common.messages.subjects import Bucket, ObjectBucket, WorkQueue

DUPLICATE_WINDOW_S = 120.0
CONSUMER = "takers"

_NANOSECONDS = 1_000_000_000


def nanoseconds(seconds: float) -> int:
    """The broker's unit for durations."""
    return int(seconds * _NANOSECONDS)


def queue_config(queue: WorkQueue[Any], replicas: int) -> dict[str, object]:
    """A work queue: one message per job at most, refused when full, gone when acknowledged."""
    return _stream(queue.name, [queue.all], replicas) | {
        "retention": "workqueue",
        "max_msgs": queue.max_messages,
        "max_msgs_per_subject": 1,
        "discard_new_per_subject": True,
        "duplicate_window": nanoseconds(DUPLICATE_WINDOW_S),
    }


def consumer_config(ack_wait_s: float, replicas: int) -> dict[str, object]:
    """The one consumer of a queue, shared by all takers."""
    return {
        "name": CONSUMER,
        "durable_name": CONSUMER,
        "ack_policy": "explicit",
        "ack_wait": nanoseconds(ack_wait_s),
        "deliver_policy": "all",
        "max_deliver": -1,
        "replay_policy": "instant",
        "num_replicas": replicas,
    }


def bucket_config(bucket: Bucket[Any], replicas: int) -> dict[str, object]:
    """A key-value bucket with one value per key. Marks of deletion may carry a time to live."""
    return _stream(bucket_stream(bucket), [f"$KV.{bucket.name}.>"], replicas) | {
        "max_bytes": bucket.max_bytes,
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "deny_delete": True,
    }


def object_config(bucket: ObjectBucket, replicas: int) -> dict[str, object]:
    """An object store: chunks under ``C``, what is known of each object under ``M``."""
    return _stream(object_stream(bucket), [f"$O.{bucket.name}.C.>", f"$O.{bucket.name}.M.>"], replicas) | {
        "max_bytes": bucket.max_bytes,
        "allow_rollup_hdrs": True,
    }


def bucket_stream(bucket: Bucket[Any]) -> str:
    return f"KV_{bucket.name}"


def object_stream(bucket: ObjectBucket) -> str:
    return f"OBJ_{bucket.name}"


async def ensure_stream(jetstream: JetStream, config: dict[str, object], deadline_s: float) -> None:
    """Create the stream, or change the one there is.

    Raises:
        CannotPrepare: the broker refused.
    """
    name = config["name"]
    try:
        try:
            await jetstream.call(f"STREAM.CREATE.{name}", config, deadline_s)
        except Rejected as error:
            if not error.name_in_use:
                raise
            await jetstream.call(f"STREAM.UPDATE.{name}", config, deadline_s)
    except Rejected as error:
        hint = "; raise the broker's max_file_store or lower the bucket's max_bytes" if error.full else ""
        raise CannotPrepare(f"{name}: {error.description}{hint}") from error


async def ensure_consumer(jetstream: JetStream, stream: str, config: dict[str, object], deadline_s: float) -> None:
    """Create the queue's consumer, or change the one there is.

    Raises:
        CannotPrepare: the broker refused.
    """
    try:
        await jetstream.call(
            f"CONSUMER.CREATE.{stream}.{CONSUMER}", {"stream_name": stream, "config": config}, deadline_s
        )
    except Rejected as error:
        raise CannotPrepare(f"{stream}: {error.description}") from error


def _stream(name: str, subjects: list[str], replicas: int) -> dict[str, object]:
    return {
        "name": name,
        "subjects": subjects,
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": replicas,
        "allow_direct": True,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
    }
