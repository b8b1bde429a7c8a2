"""Which decode instance goes on with a sequence, decided in the prefill instance (TetriInfer, section 3.3.4).

The cluster monitor broadcasts what every decode instance has free and runs. Instances with room for the sequence are
*alpha*, the others *beta*. Of two of alpha that chance picks, that one is taken which would suffer least: where heavy
decodes (long answers) would be fewest beside light ones. Between two broadcasts an instance knows what itself has sent
(``counts_pending``); without that all prefill instances herd to whoever looked best at the last one.

``LEAST_DELAY`` is ours and ties this to MemServe: of the two, the one where the sequence and those beside it lose the
least time. Tokens whose keys and values the instance has already need not travel, and interference is time as well, so
that both count in milliseconds and neither is a tie-break of the other.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from common.policies.language.length_prediction import LengthRange

# An answer of which more tokens are predicted is heavy (TetriInfer, section 5.1).
HEAVY_ABOVE = 128


class DispatchRule(StrEnum):
    """``RANDOM`` and ``IMBALANCE`` (all heavy ones to one instance) are what the paper compares with."""

    POWER_OF_TWO = "power_of_two"
    LEAST_DELAY = "least_delay"
    RANDOM = "random"
    IMBALANCE = "imbalance"


class RatioMode(StrEnum):
    """What of a candidate is compared: its heavy:light ratio with the sequence, the mean ratio of both candidates if it
    goes there, or its ratio as it is. By any of these, light ones all go where few are heavy, as nothing says how many
    there are already. ``BY_KIND`` sends heavy ones by their ratio and light ones to the freest memory.
    """

    BY_KIND = "by_kind"
    AFTER = "after"
    AVERAGE = "average"
    LITERAL = "literal"


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """One decode instance at the last broadcast. ``free_blocks``: what those that wait there will take is not free."""

    instance: str
    free_blocks: int
    heavy: int
    light: int


@dataclass(frozen=True, slots=True)
class DelayCost:
    """What ``LEAST_DELAY`` reckons with, in milliseconds.

    Attributes:
        sequence_ms: what one more sequence adds to every step of a batch.
        heavy_ms: what a heavy one adds beyond that.
        transfer_token_ms: for one token's keys and values on the link.
    """

    sequence_ms: float
    heavy_ms: float
    transfer_token_ms: float


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadsBroadcast:
    """What the monitor tells; instances that are not in it take nothing new."""

    loads: tuple[DecodeLoad, ...]


@dataclass(frozen=True, slots=True)
class SequenceBegan:
    """Its first chunk is computed: time to choose.

    Attributes:
        draws: two numbers in [0, 1), by chance.
        prefix_tokens: how many of the prompt's tokens an instance has already; 0 where it is not named.
        avoid: who did not take it; chosen only where there is no other.
    """

    sequence: str
    prompt_tokens: int
    predicted: LengthRange
    draws: tuple[float, float]
    prefix_tokens: Mapping[str, int] = field(default_factory=dict)
    avoid: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class HeldLongEnough:
    """It has waited for an instance with room for as long as it may: now it goes to whoever has most."""

    sequence: str


@dataclass(frozen=True, slots=True)
class SequenceHandedOver:
    """The decode instance has it, and counts it from now on."""

    sequence: str


@dataclass(frozen=True, slots=True)
class SequenceGone:
    """It was cancelled, or lost."""

    sequence: str


@dataclass(frozen=True, slots=True)
class InstanceGone:
    """Whom it chose is gone: nothing for it, unless the next broadcast names it."""

    instance: str


Event = LoadsBroadcast | SequenceBegan | HeldLongEnough | SequenceHandedOver | SequenceGone | InstanceGone


@dataclass(frozen=True, slots=True)
class ChooseDecode:
    """Hand the sequence over to this instance."""

    sequence: str
    instance: str
    reason: str


# --- the policy --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sent:
    """What this instance has sent and no broadcast has counted yet."""

    instance: str
    blocks: int
    heavy: bool
    handed_over: bool = False


@dataclass(slots=True)
class _View:
    """A decode instance as it is believed to be now."""

    instance: str
    free_blocks: int
    heavy: int
    light: int

    def ratio(self, heavy: bool | None) -> float:
        """Heavy to light, with one more of that kind; None: as it is."""
        heavies = self.heavy + (heavy is True)
        lights = self.light + (heavy is False)
        return heavies / max(1, lights)


class DecodeDispatch:
    """One prefill instance's dispatcher.

    Args:
        heavy_above: an answer of which more tokens than this are predicted is heavy.
        room_for_high: alpha is who has room for the upper end of the predicted range, not only for the lower.
        holds: with no alpha, wait for the next broadcast; else take the freest of beta.
        delay: for ``LEAST_DELAY``.
    """

    def __init__(
        self,
        rule: DispatchRule = DispatchRule.POWER_OF_TWO,
        heavy_above: int = HEAVY_ABOVE,
        counts_pending: bool = True,
        ratio_mode: RatioMode = RatioMode.BY_KIND,
        room_for_high: bool = False,
        holds: bool = True,
        delay: DelayCost | None = None,
        block_tokens: int = 16,
    ) -> None:
        if rule is DispatchRule.LEAST_DELAY and delay is None:
            raise ValueError("least_delay needs to know what delays cost")
        self._rule = rule
        self._heavy_above = heavy_above
        self._counts_pending = counts_pending
        self._ratio_mode = ratio_mode
        self._room_for_high = room_for_high
        self._holds = holds
        self._delay = delay or DelayCost(0.0, 0.0, 0.0)
        self._block_tokens = block_tokens
        self._loads: tuple[DecodeLoad, ...] = ()
        self._sent: dict[str, _Sent] = {}
        self._held: dict[str, SequenceBegan] = {}

    @property
    def held(self) -> int:
        """How many sequences wait for an instance with room."""
        return len(self._held)

    def handle(self, event: Event) -> list[ChooseDecode]:
        """Take in what happened; what was chosen, those that were held before first."""
        match event:
            case LoadsBroadcast(loads):
                self._loads = loads
                self._sent = {name: sent for name, sent in self._sent.items() if not sent.handed_over}
                return self._choose(list(self._held.values()))
            case SequenceBegan():
                return self._choose([event])
            case HeldLongEnough(name):
                held = self._held.get(name)
                return self._choose([held], holds=False) if held is not None else []
            case SequenceHandedOver(name):
                if (sent := self._sent.get(name)) is not None:
                    sent.handed_over = True
            case SequenceGone(name):
                self._sent.pop(name, None)
                self._held.pop(name, None)
            case InstanceGone(instance):
                self._loads = tuple(load for load in self._loads if load.instance != instance)
        return []

    def _choose(self, sequences: Sequence[SequenceBegan], holds: bool | None = None) -> list[ChooseDecode]:
        chosen = []
        for began in sequences:
            self._held.pop(began.sequence, None)
            choice = self._choose_one(began, self._holds if holds is None else holds)
            if choice is None:
                self._held[began.sequence] = began
                continue
            self._sent[began.sequence] = _Sent(choice.instance, self._need(began), self._is_heavy(began))
            chosen.append(choice)
        return chosen

    def _choose_one(self, began: SequenceBegan, holds: bool) -> ChooseDecode | None:
        there = self._views()
        views = [view for view in there if view.instance not in began.avoid] or there
        if not views:
            return None
        heavy = self._is_heavy(began)
        kind = "heavy" if heavy else "light"
        if self._rule is DispatchRule.RANDOM:
            view = views[int(began.draws[0] * len(views))]
            return ChooseDecode(began.sequence, view.instance, f"{kind}; any of {len(views)}")
        if self._rule is DispatchRule.IMBALANCE:
            view = views[0] if heavy else min(views[1:] or views, key=lambda other: (other.light, other.instance))
            return ChooseDecode(began.sequence, view.instance, f"{kind}; all heavy ones go to {views[0].instance}")
        need = self._need(began)
        alpha = [view for view in views if view.free_blocks >= need]
        if not alpha:
            if holds:
                return None
            view = max(views, key=lambda other: other.free_blocks)
            return ChooseDecode(began.sequence, view.instance, f"{kind}; nobody has {need} blocks, this the most")
        two = _draw_two(alpha, began.draws)
        view = min(two, key=lambda one: (self._suffers(one, two, began), -one.free_blocks, one.instance))
        among = " and ".join(f"{one.instance} {one.heavy}:{one.light}" for one in two)
        return ChooseDecode(began.sequence, view.instance, f"{kind}; of {len(alpha)} with {need} blocks free {among}")

    def _suffers(self, view: _View, two: Collection[_View], began: SequenceBegan) -> float:
        """What is least for the better one of the two."""
        heavy = self._is_heavy(began)
        if self._rule is DispatchRule.LEAST_DELAY:
            return self._delay_ms(view, began)
        if self._ratio_mode is RatioMode.LITERAL:
            return view.ratio(None)
        if self._ratio_mode is RatioMode.AVERAGE:
            return sum(other.ratio(heavy if other is view else None) for other in two) / len(two)
        if self._ratio_mode is RatioMode.BY_KIND and not heavy:
            return 0.0  # what is free decides
        return view.ratio(heavy)

    def _delay_ms(self, view: _View, began: SequenceBegan) -> float:
        """What the sequence waits for its keys and values, and what it and its neighbours cost each other.

        They share as many steps as the shorter one has tokens to come; of a light one that is half of what is light.
        """
        cost = self._delay
        missing = began.prompt_tokens - began.prefix_tokens.get(view.instance, 0)
        own = max(1, began.predicted.middle)
        shared_light = view.light * min(own, self._heavy_above // 2)
        shared_heavy = view.heavy * own
        heavier = shared_heavy + (shared_light if self._is_heavy(began) else 0)
        steps_ms = 2 * cost.sequence_ms * (shared_light + shared_heavy) + cost.heavy_ms * heavier
        return missing * cost.transfer_token_ms + steps_ms

    def _views(self) -> list[_View]:
        views = {load.instance: _View(load.instance, load.free_blocks, load.heavy, load.light) for load in self._loads}
        if self._counts_pending:
            for sent in self._sent.values():
                if (view := views.get(sent.instance)) is not None:
                    view.free_blocks -= sent.blocks
                    view.heavy += sent.heavy
                    view.light += not sent.heavy
        return sorted(views.values(), key=lambda view: view.instance)

    def _is_heavy(self, began: SequenceBegan) -> bool:
        return began.predicted.low > self._heavy_above

    def _need(self, began: SequenceBegan) -> int:
        answer = began.predicted.high if self._room_for_high else began.predicted.low
        return -(-(began.prompt_tokens + answer) // self._block_tokens)


def _draw_two(alpha: Sequence[_View], draws: tuple[float, float]) -> list[_View]:
    """Two different ones, or the only one."""
    first = int(draws[0] * len(alpha))
    if len(alpha) == 1:
        return [alpha[first]]
    second = int(draws[1] * (len(alpha) - 1))
    return [alpha[first], alpha[second if second < first else second + 1]]
