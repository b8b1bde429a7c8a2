"""When an instance changes its role (TetriInfer, section 3.5): prefill becomes decode or the other way round.

A flip costs a few milliseconds, and before them the time in which the instance finishes what it has. ``IdleFlip`` is
the paper's: an instance that had nothing to do for a minute. ``QueueFlip`` is ours. It counts **queueing time**: as
long as the sequences of one role wait more than those of the other, for each instance there is, the difference adds up;
once it exceeds what a flip costs, one instance flips. A short queue must last long, a long one need not; and what the
first has cost is paid back before a flip in the other direction is thought of. That is its hysteresis.

Neither ever takes a role's last instance, and neither flips a second instance while one is on its way. A role may lose
its last one all the same, by a death; who comes back has the role that it was started with. So a role that has had
nobody for a while gets an instance whatever waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages.cluster import LanguageRole

_OTHER = {LanguageRole.PREFILL: LanguageRole.DECODE, LanguageRole.DECODE: LanguageRole.PREFILL}


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """One instance as it is now.

    Attributes:
        waiting: sequences that wait there for what its role does.
        busy: whether it has anything at all.
        flipping: it is on its way to another role; ``role`` is the one that it leaves.
    """

    instance: str
    role: LanguageRole
    waiting: int
    busy: bool
    flipping: bool = False


@dataclass(frozen=True, slots=True)
class FlipInstance:
    """Let it finish what it has, then change its role."""

    instance: str
    role: LanguageRole
    reason: str


# Long enough for a process that died to be there again.
_EMPTY_S = 2.0


class FlipPolicy(Protocol):
    """Is asked at regular times."""

    def handle(self, loads: Sequence[InstanceLoad], now_s: float) -> list[FlipInstance]:
        """Who is to flip, given how everybody is."""


class _EmptyRole:
    """Gives a role that has had nobody for a while one of the other's instances, if that has two."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def handle(self, loads: Sequence[InstanceLoad], now_s: float) -> list[FlipInstance]:
        empty = [role for role in LanguageRole if all(load.role is not role for load in loads)]
        if len(empty) != 1 or len(loads) < 2:
            self._since_s = None
            return []
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < _EMPTY_S or any(load.flipping for load in loads):
            return []
        self._since_s = None
        return [FlipInstance(_least_busy(loads).instance, empty[0], f"nobody has been there for {empty[0].value}")]


class IdleFlip:
    """The paper's rule: idle for ``idle_s`` while the other role has work."""

    def __init__(self, idle_s: float = 60.0) -> None:
        self._idle_s = idle_s
        self._idle_since: dict[str, float] = {}
        self._empty = _EmptyRole()

    def handle(self, loads: Sequence[InstanceLoad], now_s: float) -> list[FlipInstance]:
        known = {load.instance for load in loads}
        self._idle_since = {name: since for name, since in self._idle_since.items() if name in known}
        for load in loads:
            if load.busy:
                self._idle_since.pop(load.instance, None)
            else:
                self._idle_since.setdefault(load.instance, now_s)
        if filling := self._empty.handle(loads, now_s):
            return filling
        if any(load.flipping for load in loads):
            return []
        for load in sorted(loads, key=lambda load: load.instance):
            idle_s = now_s - self._idle_since.get(load.instance, now_s)
            others = [other for other in loads if other.role is load.role]
            wanted = any(other.busy for other in loads if other.role is not load.role)
            if idle_s >= self._idle_s and len(others) > 1 and wanted:
                del self._idle_since[load.instance]
                return [FlipInstance(load.instance, _OTHER[load.role], f"idle for {idle_s:g} s")]
        return []


class QueueFlip:
    """Ours.

    Args:
        cost_s: what a flip costs, in seconds that sequences wait, for one instance.
    """

    def __init__(self, cost_s: float = 5.0) -> None:
        if cost_s <= 0:
            raise ValueError("a flip costs more than nothing")
        self._cost_s = cost_s
        self._asked_s: float | None = None
        # Above 0: those who wait for prefill have waited so much longer; below 0: those for decode.
        self._owed_s = 0.0
        self._empty = _EmptyRole()

    def handle(self, loads: Sequence[InstanceLoad], now_s: float) -> list[FlipInstance]:
        passed_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        self._asked_s = now_s
        prefill = [load for load in loads if load.role is LanguageRole.PREFILL]
        decode = [load for load in loads if load.role is LanguageRole.DECODE]
        if (filling := self._empty.handle(loads, now_s)) or not prefill or not decode:
            return filling
        difference = _queue(prefill) - _queue(decode)
        self._owed_s = max(-self._cost_s, min(self._cost_s, self._owed_s + passed_s * difference))
        if abs(self._owed_s) < self._cost_s or any(load.flipping for load in loads):
            return []
        gains, gives = (prefill, decode) if self._owed_s > 0 else (decode, prefill)
        if len(gives) < 2 or not _still_gains(gains, gives):
            return []
        self._owed_s = 0.0
        leaving = _least_busy(gives)
        reason = f"{_queue(gains):.1f} wait for {gains[0].role.value} at each instance, {_queue(gives):.1f} here"
        return [FlipInstance(leaving.instance, gains[0].role, reason)]


def _least_busy(loads: Sequence[InstanceLoad]) -> InstanceLoad:
    return min(loads, key=lambda load: (load.busy, load.waiting, load.instance))


def _queue(loads: Sequence[InstanceLoad]) -> float:
    return sum(load.waiting for load in loads) / len(loads)


def _still_gains(gains: Sequence[InstanceLoad], gives: Sequence[InstanceLoad]) -> bool:
    """Whether the queue that was longer will not be the shorter one with an instance more against one less."""
    after = sum(load.waiting for load in gains) / (len(gains) + 1)
    return after >= sum(load.waiting for load in gives) / (len(gives) - 1)
