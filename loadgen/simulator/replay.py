"""A run's events on record, and played again: a policy that is pure decides the same every time.

The record is a text of JSON lines, each ``{"at_s": seconds, "event": name, ...}`` with the event's own fields. It is
the same for a live scheduler's events and the simulator's.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, get_args

from common.messages.cluster import Service
from common.policies.video import events
from common.policies.video.decisions import Decision
from common.policies.video.events import Event
from common.policies.video.policy import Policy

_EVENTS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(events.Event)}

TimedEvent = tuple[float, Event]
TimedDecision = tuple[float, Decision]


class WrongRecord(ValueError):
    """A line is no event; the message says which and why."""


def replay(recorded: Iterable[TimedEvent], policy: Policy) -> list[TimedDecision]:
    """What ``policy``, which must be fresh, decides on hearing the events at their times."""
    return [(at_s, decision) for at_s, event in recorded for decision in policy.handle(event, at_s)]


def to_lines(recorded: Iterable[TimedEvent]) -> str:
    """The record as text; times come back bit for bit."""
    lines = [
        json.dumps({"at_s": at_s, "event": type(event).__name__, **dataclasses.asdict(event)}, separators=(",", ":"))
        for at_s, event in recorded
    ]
    return "".join(f"{line}\n" for line in lines)


def from_lines(text: str) -> list[TimedEvent]:
    """Read a record.

    Raises:
        WrongRecord: names the line.
    """
    return [_event(line, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _event(line: str, number: int) -> TimedEvent:
    try:
        fields: dict[str, Any] = json.loads(line)
        at_s, kind = float(fields.pop("at_s")), _EVENTS[fields.pop("event")]
        if "service" in fields:
            fields["service"] = Service(fields["service"])
        return at_s, kind(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WrongRecord(f"line {number} is no event: {error}") from None
