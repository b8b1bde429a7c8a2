"""When an instance changes its role (TetriInfer, section 3.5): prefill becomes decode or the other way round.

A flip costs a few milliseconds, and before them the time in which the instance finishes what it has. ``IdleFlip`` is
the paper's: an instance that had nothing to do for a minute. ``QueueFlip`` is ours. It goes by **demand**: how many
instances either role wants for what comes, and for what waits already (``flip_demand``). From that follows how many
sequences there are to be under each split, and by how many the split there is exceeds the next best. Counted over time
this is **queueing time**: once it exceeds what a flip costs, one instance flips. A small gain must last long, a large
one need not, and what spoke for one direction is paid back before a flip in the other is thought of. That is its
hysteresis; and flips are some time apart, whatever happens.

Neither ever takes a role's last instance, and neither flips a second instance while one is on its way. A role may lose
its last one all the same, by a death; who comes back has the role that it was started with. So a role that has had
nobody for a while gets an instance whatever waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages.cluster import LanguageRole
from common.policies.language.flip_demand import BATCH, Demand, Pace, Rate, crowd

_OTHER = {LanguageRole.PREFILL: LanguageRole.DECODE, LanguageRole.DECODE: LanguageRole.PREFILL}


@dataclass(frozen=True, slots=True)
class InstanceLoad:
    """One instance as it is now.

    Attributes:
        waiting: sequences that wait there for what its role does.
        busy: whether it has anything at all.
        flipping: it is on its way to another role; ``role`` is the one that it leaves.
        running: how many sequences it works on now. None if it cannot, as what others are to fetch fills its memory.
        room: how many sequences like those that it decodes it has memory for; 0: that is not known.
        prefilled_tokens: of prompts, that it has computed since it began.
    """

    instance: str
    role: LanguageRole
    waiting: int
    busy: bool
    flipping: bool = False
    running: int = 0
    room: int = 0
    prefilled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatLoad:
    """What all instances have to do together. Of an answer counts what was asked for at most, or is known better.

    Attributes:
        prompt_tokens, answer_tokens: that have come since the beginning; of prompts those that are cached nowhere.
        to_prefill: tokens of prompts that are yet to be computed.
        to_decode: tokens of the answers that nobody decodes yet.
        decoded_tokens: of all answers since the beginning; of those under way, half.
    """

    prompt_tokens: int = 0
    answer_tokens: int = 0
    to_prefill: int = 0
    to_decode: int = 0
    decoded_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class FlipInstance:
    """Let it finish what it has, then change its role."""

    instance: str
    role: LanguageRole
    reason: str


# Long enough for a process that died to be there again.
_EMPTY_S = 2.0

# In costs of a flip: what rates are averaged over, within what a backlog is to be worked off, and before what nobody
# flips. Chosen on the simulator's classes, a trace and a load that turns; see docs/decisions/0050.
_WINDOW, _WORKED_OFF, _BEGINS = 4.0, 3.0, 2.0
_ERRS = 0.02
_QUEUED_S, _LEAST_WEIGHT = 2.0, 0.02
# In batches: what an instance has memory for while that is not known.
_GUESSED_ROOM = 4.0


class FlipPolicy(Protocol):
    """Is asked at regular times."""

    def handle(self, loads: Sequence[InstanceLoad], now_s: float, chats: ChatLoad) -> list[FlipInstance]:
        """Who is to flip, given how everybody is, and what there is to do."""


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

    def handle(self, loads: Sequence[InstanceLoad], now_s: float, chats: ChatLoad) -> list[FlipInstance]:
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
        cost_s: what a flip costs, in seconds that a sequence waits, for each instance there is. Rates are averaged over
            four times as long, a backlog is to be worked off in three times as long, and no two flips are closer.
        batch: how many sequences at once make a step of decoding take twice as long as one with none.
    """

    def __init__(self, cost_s: float = 5.0, batch: float = BATCH) -> None:
        if min(cost_s, batch) <= 0:
            raise ValueError("a flip costs more than nothing, and so does a sequence")
        self._cost_s = cost_s
        self._batch = batch
        self._asked_s: float | None = None
        self._prompts, self._answers = Rate(_WINDOW * cost_s), Rate(_WINDOW * cost_s)
        self._prefill, self._decode = Pace(), Pace()
        self._lately: dict[str, float] = {}
        self._prefilled: dict[str, int] = {}
        self._room: float | None = None
        # Rates of a moment say nothing.
        self._may_flip_s: float | None = None
        # Above 0: for so many seconds sequences would have been spared waiting by one more that prefills; below 0: by
        # one more that decodes.
        self._owed_s = 0.0
        self._empty = _EmptyRole()

    def handle(self, loads: Sequence[InstanceLoad], now_s: float, chats: ChatLoad) -> list[FlipInstance]:
        passed_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        self._asked_s = now_s
        if self._may_flip_s is None:
            self._may_flip_s = now_s + _BEGINS * self._cost_s
        prefill = [load for load in loads if load.role is LanguageRole.PREFILL]
        decode = [load for load in loads if load.role is LanguageRole.DECODE]
        self._saw(prefill, decode, chats, passed_s)
        if (filling := self._empty.handle(loads, now_s)) or not prefill or not decode:
            return filling
        if any(load.flipping for load in loads):
            return []
        demand = self._demand(chats)
        step, gain = self._best_step(demand, len(prefill), len(decode))
        self._owe(step, gain * passed_s, self._cost_s * len(loads))
        step = 1 if self._owed_s > 0 else -1
        gives = decode if step > 0 else prefill
        if abs(self._owed_s) < self._cost_s * len(loads) or now_s < self._may_flip_s or len(gives) < 2:
            return []
        self._owed_s, self._may_flip_s = 0.0, now_s + self._cost_s
        leaving = min(gives, key=lambda load: (load.busy, load.waiting + load.running, load.instance))
        reason = f"{demand.prefill:.1f} wanted for prefill and {demand.decode:.1f} for decode"
        return [FlipInstance(leaving.instance, _OTHER[leaving.role], f"{reason}; {len(gives)} are here")]

    def _saw(
        self, prefill: Sequence[InstanceLoad], decode: Sequence[InstanceLoad], chats: ChatLoad, passed_s: float
    ) -> None:
        """Take in what has come, been done and been used since it was last asked."""
        self._prompts.saw(chats.prompt_tokens, passed_s)
        self._answers.saw(chats.answer_tokens, passed_s)
        before, self._prefilled = self._prefilled, {load.instance: load.prefilled_tokens for load in prefill}
        lately, self._lately = self._lately, {}
        for load in prefill:
            # Chunks that are full for want of a queue cost as much as those that are not: what a token takes is seen
            # where prompts wait. A little counts always, for want of anything else.
            queued = lately.get(load.instance, 0.0)
            queued += (min(1, load.waiting) - queued) * min(1.0, passed_s / _QUEUED_S)
            self._lately[load.instance] = queued
            done = load.prefilled_tokens - before.get(load.instance, load.prefilled_tokens)
            self._prefill.saw(passed_s if load.running else 0.0, max(0, done), max(queued, _LEAST_WEIGHT))
        used = sum(load.running / (load.running + self._batch) for load in decode)
        self._decode.saw_total(used * passed_s, chats.decoded_tokens)
        rooms = [max(load.room, load.running) for load in decode if load.room]
        if rooms:
            room = sum(rooms) / len(rooms)
            share = min(1.0, passed_s / (_WINDOW * self._cost_s))
            self._room = room if self._room is None else self._room + share * (room - self._room)

    def _demand(self, chats: ChatLoad) -> Demand:
        within_s = _WORKED_OFF * self._cost_s
        prefill = self._prefill.token_s * (self._prompts.per_s + chats.to_prefill / within_s)
        decode = self._decode.token_s * (self._answers.per_s + chats.to_decode / within_s)
        return Demand(prefill, decode, self._batch, self._room or _GUESSED_ROOM * self._batch)

    def _best_step(self, demand: Demand, prefill: int, decode: int) -> tuple[int, float]:
        """One more that prefills (1) or one less (-1), whichever is better; how many sequences fewer there were then.

        Below 0: it is better as it is, or not better by as much as such estimates err.
        """
        now = crowd(demand, prefill, decode)
        steps = [
            (crowd(demand, prefill + step, decode - step), step) for step in (1, -1) if _splits(prefill, decode, step)
        ]
        least, step = min(steps, default=(now, 1))
        return step, now * (1 - _ERRS) - least

    def _owe(self, step: int, gain_s: float, most_s: float) -> None:
        if gain_s > 0:
            self._owed_s = max(-most_s, min(most_s, self._owed_s + step * gain_s))
        else:
            left_s = max(0.0, abs(self._owed_s) + gain_s)
            self._owed_s = left_s if self._owed_s > 0 else -left_s


def _splits(prefill: int, decode: int, step: int) -> bool:
    """Whether neither role would have nobody."""
    return prefill + step > 0 and decode - step > 0


def _least_busy(loads: Sequence[InstanceLoad]) -> InstanceLoad:
    return min(loads, key=lambda load: (load.busy, load.waiting, load.instance))
