"""Key-value buckets: compare-and-set writes, reads from the leader, listings in one pass."""

from common.bus.address import checked_key
from common.bus.errors import BadReply, BusUnavailable, KeyExists, KeyMissing, StorageFull, WrongRevision
from common.bus.jetstream import JetStream, Rejected, StoredMessage
from common.bus.link import Link
from common.bus.port import Entry
from common.bus.prepare import bucket_stream
from common.bus.reader import Item, read_all
from common.messages.base import MessageError
from common.messages.subjects import Body, Bucket

_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
# A mark of deletion goes by itself after so long; every watch that was cut off notices deletions without it too.
_MARK_LIFE_S = 3600
_CREATE_ATTEMPTS = 4


def is_deletion(headers: dict[str, str] | None) -> bool:
    """Whether a stored message is the mark of a deletion, ours or the broker's own."""
    return headers is not None and ("KV-Operation" in headers or "Nats-Marker-Reason" in headers)


class Buckets:
    """The key-value methods of the bus; see ``Bus``."""

    def __init__(self, link: Link, jetstream: JetStream) -> None:
        self._link = link
        self._jetstream = jetstream

    async def get(self, bucket: Bucket[Body], key: str, deadline_s: float) -> Entry[Body]:
        stored = await self._last(bucket, key, deadline_s)
        if stored is None or _is_mark(stored):
            raise KeyMissing(key)
        try:
            return Entry(key, bucket.body.unpack(stored.data), stored.sequence)
        except MessageError as error:
            raise BadReply(f"{bucket.name}, key {key}: {error}") from error

    async def create(self, bucket: Bucket[Body], key: str, value: Body, deadline_s: float) -> int:
        expected = 0
        for _ in range(_CREATE_ATTEMPTS):
            try:
                return await self._write(bucket, key, value.pack(), deadline_s, {_EXPECTED: str(expected)})
            except _Lost:
                stored = await self._last(bucket, key, deadline_s)
                if stored is not None and not _is_mark(stored):
                    raise KeyExists(key) from None
                # Deleted before: its mark is what the next attempt replaces.
                expected = 0 if stored is None else stored.sequence
        raise KeyExists(key)

    async def replace(self, bucket: Bucket[Body], key: str, value: Body, revision: int, deadline_s: float) -> int:
        if revision < 1:
            raise WrongRevision(key, revision)
        try:
            return await self._write(bucket, key, value.pack(), deadline_s, {_EXPECTED: str(revision)})
        except _Lost:
            raise WrongRevision(key, revision) from None

    async def put(self, bucket: Bucket[Body], key: str, value: Body, deadline_s: float) -> int:
        return await self._write(bucket, key, value.pack(), deadline_s, None)

    async def delete(self, bucket: Bucket[Body], key: str, revision: int | None, deadline_s: float) -> None:
        headers = {"KV-Operation": "DEL", "Nats-TTL": str(_MARK_LIFE_S)}
        if revision is not None:
            headers[_EXPECTED] = str(revision)
        try:
            await self._write(bucket, key, b"", deadline_s, headers)
        except _Lost:
            raise WrongRevision(key, revision or 0) from None

    async def keys(self, bucket: Bucket[Body], deadline_s: float) -> list[str]:
        items = await self._read_all(bucket, headers_only=True, deadline_s=deadline_s)
        return [key_of(bucket, item.subject) for item in items]

    async def entries(self, bucket: Bucket[Body], deadline_s: float) -> list[Entry[Body]]:
        found: list[Entry[Body]] = []
        for item in await self._read_all(bucket, headers_only=False, deadline_s=deadline_s):
            key = key_of(bucket, item.subject)
            try:
                found.append(Entry(key, bucket.body.unpack(item.data), item.sequence))
            except MessageError as error:
                self._link.log.warning("unreadable value left out", bucket=bucket.name, key=key, reason=str(error))
        return found

    async def _read_all(self, bucket: Bucket[Body], *, headers_only: bool, deadline_s: float) -> list[Item]:
        items = await read_all(
            self._link,
            self._jetstream,
            bucket_stream(bucket),
            subject_of(bucket, ">"),
            headers_only=headers_only,
            deadline_s=deadline_s,
        )
        # A key written again during the pass comes twice: its last is the one that counts.
        latest = {item.subject: item for item in items}
        return sorted((i for i in latest.values() if not is_deletion(i.headers)), key=lambda item: item.sequence)

    async def _last(self, bucket: Bucket[Body], key: str, deadline_s: float) -> StoredMessage | None:
        return await self._jetstream.last(bucket_stream(bucket), subject_of(bucket, checked_key(key)), deadline_s)

    async def _write(
        self, bucket: Bucket[Body], key: str, data: bytes, deadline_s: float, headers: dict[str, str] | None
    ) -> int:
        # A write without condition may be sent twice; a conditional one, sent again, would lose against itself.
        again = headers is None or _EXPECTED not in headers
        try:
            subject = subject_of(bucket, checked_key(key))
            stored = await self._jetstream.publish(subject, data, headers, deadline_s, again=again)
        except Rejected as error:
            if error.wrong_last_sequence:
                raise _Lost from error
            if error.full:
                raise StorageFull(f"bucket {bucket.name}: {error.description}") from error
            raise BusUnavailable(str(error)) from error
        return stored.sequence


class _Lost(Exception):
    """The compare-and-set found another sequence than expected."""


def subject_of(bucket: Bucket[Body], key: str) -> str:
    return f"$KV.{bucket.name}.{key}"


def key_of(bucket: Bucket[Body], subject: str) -> str:
    return subject[len(bucket.name) + 5 :]


def _is_mark(stored: StoredMessage) -> bool:
    return b"KV-Operation:" in stored.headers or b"Nats-Marker-Reason:" in stored.headers
