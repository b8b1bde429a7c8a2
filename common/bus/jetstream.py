"""JetStream's API as questions and answers: what is stored, streams, consumers, and their errors by name.

Field names, units (durations in nanoseconds) and error codes are the broker's own.
"""

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.bus.errors import BusUnavailable, DeadlineExceeded, NobodyThere, NotPrepared
from common.bus.link import Link

# Pause before asking again when JetStream itself does not answer yet, and the longest wait for one answer to a
# question that may be asked twice.
_PAUSE_S = 0.05
_ATTEMPT_S = 2.0

_STREAM_NOT_FOUND = 10059
_MESSAGE_NOT_FOUND = 10037
_CONSUMER_NOT_FOUND = 10014
_UNAVAILABLE = 503


class Rejected(Exception):
    """JetStream answered with an error. ``code`` is HTTP-like, ``error_code`` JetStream's own."""

    def __init__(self, subject: str, code: int, error_code: int, description: str) -> None:
        super().__init__(f"{subject}: {description} ({error_code})")
        self.code = code
        self.error_code = error_code
        self.description = description

    @property
    def wrong_last_sequence(self) -> bool:
        return self.error_code in (10071, 10164)

    @property
    def full(self) -> bool:
        """A limit of the stream, the account or the disk was reached."""
        return self.error_code in (10023, 10028, 10047, 10077, 10122)

    @property
    def name_in_use(self) -> bool:
        return self.error_code == 10058


@dataclass(frozen=True)
class Stored:
    """The broker's receipt. ``duplicate``: it had the message already and stored nothing."""

    sequence: int
    duplicate: bool


@dataclass(frozen=True)
class StoredMessage:
    """A message as it lies in a stream."""

    subject: str
    sequence: int
    data: bytes
    headers: bytes


class JetStream:
    """Questions to JetStream over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def call(self, api: str, body: Mapping[str, object] | None, deadline_s: float) -> dict[str, Any]:
        """Ask one of the API's questions that may be asked twice with no harm.

        Raises:
            Rejected, NotPrepared, BusUnavailable, DeadlineExceeded
        """
        payload = json.dumps(body).encode() if body is not None else b""
        return await self._ask(f"$JS.API.{api}", payload, None, deadline_s, again=True)

    async def publish(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None,
        deadline_s: float,
        *,
        again: bool = False,
    ) -> Stored:
        """Store a message. ``again``: it may be sent twice, the broker or the caller knows a repetition.

        Raises:
            Rejected, NotPrepared, BusUnavailable, DeadlineExceeded
        """
        answer = await self._ask(subject, data, headers, deadline_s, again=again)
        return Stored(sequence=answer["seq"], duplicate=answer.get("duplicate", False))

    async def last(self, stream: str, subject: str, deadline_s: float) -> StoredMessage | None:
        """The last message on ``subject``, from the stream's leader: it sees every write acknowledged before."""
        try:
            answer = await self.call(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}, deadline_s)
        except Rejected as error:
            if error.error_code == _MESSAGE_NOT_FOUND:
                return None
            raise
        message = answer["message"]
        return StoredMessage(
            subject=message["subject"],
            sequence=message["seq"],
            data=base64.b64decode(message.get("data", "")),
            headers=base64.b64decode(message.get("hdrs", "")),
        )

    async def purge(self, stream: str, subject: str, deadline_s: float) -> int:
        """Remove every message on ``subject``; how many there were."""
        answer = await self.call(f"STREAM.PURGE.{stream}", {"filter": subject}, deadline_s)
        purged: int = answer["purged"]
        return purged

    async def _ask(
        self, subject: str, payload: bytes, headers: dict[str, str] | None, deadline_s: float, *, again: bool
    ) -> dict[str, Any]:
        clock = asyncio.get_running_loop().time
        end_s = clock() + deadline_s
        reason: Exception | None = None
        while True:
            left_s = end_s - clock()
            try:
                message = await self._link.request(
                    subject, payload, min(left_s, _ATTEMPT_S) if again else left_s, headers
                )
                answer: dict[str, Any] = json.loads(message.data)
                error = answer.get("error")
                if error is None:
                    return answer
                rejection = _rejection(subject, error)
                if error["code"] != _UNAVAILABLE or not isinstance(rejection, Rejected) or rejection.full:
                    raise rejection
                reason = BusUnavailable(f"{subject}: {error.get('description', 'unavailable')}")
            except NobodyThere as nobody:
                # No stream listens on the subject, or JetStream is not up yet: in both cases nothing was stored.
                reason = nobody
            except (BusUnavailable, DeadlineExceeded) as late:
                if not again or self._link.closed:
                    raise
                # What was answered before says more than that the last attempt, a short one maybe, was too short.
                reason = reason if isinstance(reason, NobodyThere) else late
            if clock() + _PAUSE_S >= end_s:
                raise self._given_up(subject, reason)
            await asyncio.sleep(_PAUSE_S)

    def _given_up(self, subject: str, reason: Exception) -> Exception:
        if isinstance(reason, NobodyThere):
            return BusUnavailable(
                f"nothing stores {subject}: its queue or bucket is not prepared, or JetStream is down"
            )
        return reason


def _rejection(subject: str, error: Mapping[str, Any]) -> Exception:
    code, error_code = int(error["code"]), int(error.get("err_code", 0))
    description = str(error.get("description", "no description"))
    if error_code == _STREAM_NOT_FOUND:
        return NotPrepared(f"{subject}: no such queue or bucket; prepare it first")
    return Rejected(subject, code, error_code, description)
