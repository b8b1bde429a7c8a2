"""The control plane in virtual time: predictors beside prefill, dispatchers, the monitor's broadcasts, and flips.

Everything that decides is a class of ``common.policies``; this carries events to them and decisions from them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from common.messages.cluster import LanguageRole
from common.policies.language.chat_loads import ChatCounts
from common.policies.language.cluster_monitor import ClusterMonitor, LoadReported, PeriodPassed, StoppedDecoding
from common.policies.language.decode_dispatch import (
    ChooseDecode,
    DecodeDispatch,
    DecodeLoad,
    LoadsBroadcast,
    SequenceBegan,
    SequenceHandedOver,
)
from common.policies.language.flip import ChatLoad, FlipInstance, FlipPolicy, InstanceLoad
from common.policies.language.length_prediction import LengthRange
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.history import Histories
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.router import Router

FLIP_S = 0.006  # 5 to 7 ms in the paper (TetriInfer, section 3.5)


@dataclass(frozen=True, slots=True)
class FlipDone:
    """One flip as it was carried out: when it was decided, when the instance had nothing left, when it was done."""

    instance: str
    role: LanguageRole
    decided_s: float
    drained_s: float
    done_s: float
    reason: str


@dataclass(slots=True)
class _Member:
    instance: Instance
    role: LanguageRole
    flip: FlipInstance | None = None
    flip_decided_s: float = 0.0
    switching: bool = False
    # What was sent here or is on its way, by whether it is heavy.
    decodes: dict[str, bool] = field(default_factory=dict)
    inbound: set[str] = field(default_factory=set)


class ControlPlane:
    """TetriInfer's cluster: every instance has one role, and prefill instances choose who goes on.

    Args:
        new_dispatch: makes a dispatcher for an instance that begins to prefill.
        chosen: is called when a sequence's decode instance is.
        draws: numbers in [0, 1), two for each dispatch.
        flips: None: roles stay what they are.
        histories: who has prefixes; None: nobody.
        period_s: between two ticks.
        heavy_above: an answer of which more tokens are predicted counts as heavy in what instances report.
    """

    def __init__(
        self,
        clock: Clock,
        router: Router,
        new_dispatch: Callable[[], DecodeDispatch],
        chosen: Callable[[str, str], None],
        draws: np.random.Generator,
        flips: FlipPolicy | None = None,
        histories: Histories | None = None,
        period_s: float = 0.1,
        heavy_above: int = 128,
    ) -> None:
        self.flipped: list[FlipDone] = []
        self.dispatched: list[ChooseDecode] = []
        self._clock = clock
        self._router = router
        self._new_dispatch = new_dispatch
        self._chosen = chosen
        self._draws = draws
        self._flips = flips
        self._histories = histories
        self.period_s = period_s
        self._heavy_above = heavy_above
        self._monitor = ClusterMonitor(period_s)
        self._members: dict[str, _Member] = {}
        self._dispatchers: dict[str, DecodeDispatch] = {}
        self._heavy: dict[str, bool] = {}
        self._counts = ChatCounts()

    def add(self, instance: Instance, role: LanguageRole) -> None:
        """An instance begins to take what its role does."""
        self._members[instance.name] = _Member(instance, role)
        self._begin(self._members[instance.name])

    def roles(self) -> Collection[LanguageRole]:
        """What there is now; who flips counts as neither."""
        return [member.role for member in self._members.values() if member.flip is None]

    def tick(self) -> None:
        """Instances report, the monitor tells, flips are thought of. Once every period."""
        now_s = self._clock.now_s
        for member in self._members.values():
            if member.role is LanguageRole.DECODE and member.flip is None:
                self._monitor.handle(LoadReported(_load(member)), now_s)
        self._broadcast(self._monitor.handle(PeriodPassed(), now_s))
        if self._flips is not None:
            loads = [_as_flips_see(member) for member in self._members.values()]
            for flip in self._flips.handle(loads, now_s, self._chats()):
                self._decide(flip)
        for member in self._members.values():
            self._go_on(member)

    def came(self, request: ChatRequest, cached_tokens: int) -> None:
        """A request has its prefill instance, where so much of its prompt is cached."""
        self._counts.prompt_tokens += request.prompt_tokens - cached_tokens
        self._counts.answer_tokens += request.answer_tokens

    def began(self, request: ChatRequest, prefill: str, predicted: LengthRange) -> None:
        """A sequence's first chunk is computed, and its length predicted."""
        first, second = self._draws.random(2).tolist()
        self._heavy[request.name] = predicted.low > self._heavy_above
        prefixes = self._histories.tokens_at(request) if self._histories is not None else {}
        event = SequenceBegan(request.name, request.prompt_tokens, predicted, (first, second), prefixes)
        self._carry_out(self._dispatchers[prefill].handle(event))

    def handed_over(self, request: ChatRequest, prefill: str, decode: str) -> None:
        """Keys and values are there."""
        self._members[decode].inbound.discard(request.name)
        if (dispatcher := self._dispatchers.get(prefill)) is not None:
            dispatcher.handle(SequenceHandedOver(request.name))

    def ended(self, request: ChatRequest, instance: str) -> None:
        self._heavy.pop(request.name, None)
        self._counts.answered_tokens += request.answer_tokens
        self._members[instance].decodes.pop(request.name, None)

    def _chats(self) -> ChatLoad:
        """What the live scheduler knows: of an answer the most that was asked for, here its length."""
        answers = [member.instance.answer_tokens for member in self._members.values()]
        prefills = [member.instance for member in self._members.values() if member.role is LanguageRole.PREFILL]
        to_prefill = sum(instance.batching.prompt_tokens for instance in prefills)
        return self._counts.load(
            to_prefill, sum(waiting for _, waiting in answers), sum(decoding for decoding, _ in answers)
        )

    # --- flips --------------------------------------------------------------------------------------------------

    def _decide(self, flip: FlipInstance) -> None:
        member = self._members[flip.instance]
        member.flip = flip
        member.flip_decided_s = self._clock.now_s
        self._router.has_roles(flip.instance, ())
        if member.role is LanguageRole.DECODE:
            self._broadcast(self._monitor.handle(StoppedDecoding(flip.instance), self._clock.now_s))

    def _go_on(self, member: _Member) -> None:
        """Once an instance that flips has nothing left, it takes a few milliseconds."""
        drained = member.instance.idle and not member.inbound and not self._holds(member)
        if member.flip is None or member.switching or not drained:
            return
        member.switching = True
        drained_s = self._clock.now_s
        self._clock.after(FLIP_S, lambda: self._switch(member, drained_s))

    def _holds(self, member: _Member) -> bool:
        dispatcher = self._dispatchers.get(member.instance.name)
        return dispatcher is not None and dispatcher.held > 0

    def _switch(self, member: _Member, drained_s: float) -> None:
        flip = member.flip
        if flip is None:
            raise RuntimeError(f"{member.instance.name} changes its role without having been told to")
        member.role, member.flip, member.switching = flip.role, None, False
        now_s = self._clock.now_s
        self.flipped.append(FlipDone(flip.instance, flip.role, member.flip_decided_s, drained_s, now_s, flip.reason))
        self._begin(member)

    def _begin(self, member: _Member) -> None:
        name = member.instance.name
        self._dispatchers.pop(name, None)
        if member.role is LanguageRole.PREFILL:
            self._dispatchers[name] = self._new_dispatch()
            self._router.has_roles(name, (LanguageRole.PREFILL,))
        else:
            self._router.has_roles(name, (LanguageRole.DECODE,))

    # --- decisions ----------------------------------------------------------------------------------------------

    def _broadcast(self, broadcasts: list[LoadsBroadcast]) -> None:
        for broadcast in broadcasts:
            for dispatcher in list(self._dispatchers.values()):
                self._carry_out(dispatcher.handle(broadcast))

    def _carry_out(self, choices: list[ChooseDecode]) -> None:
        for choice in choices:
            self.dispatched.append(choice)
            member = self._members[choice.instance]
            member.inbound.add(choice.sequence)
            member.decodes[choice.sequence] = self._heavy[choice.sequence]
            self._chosen(choice.sequence, choice.instance)


def _load(member: _Member) -> DecodeLoad:
    """What a decode instance reports: of what has arrived."""
    here = [heavy for name, heavy in member.decodes.items() if name not in member.inbound]
    free = member.instance.free_blocks - member.instance.waiting_blocks
    return DecodeLoad(member.instance.name, free, sum(here), len(here) - sum(here))


def _as_flips_see(member: _Member) -> InstanceLoad:
    instance, prefills = member.instance, member.role is LanguageRole.PREFILL
    running = instance.batching.running
    used_blocks = instance.machine.blocks - instance.free_blocks
    return InstanceLoad(
        instance.name,
        member.role,
        instance.batching.waiting,
        not instance.idle,
        member.flip is not None,
        running=int(instance.computing) if prefills else running,
        room=instance.machine.blocks * running // used_blocks if used_blocks else 0,
        prefilled_tokens=instance.computed_prompt_tokens,
    )
