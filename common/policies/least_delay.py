"""Which instances prefill and decode a sequence: those where all sequences together lose the least time. Ours.

TetriInfer gives every instance one role, flips it when it has long been idle, and counts what decode instances run.
Here an instance's role is what it is given: any may prefill, decode or do both, so that a role changes with the next
sequence and nothing need be drained. What keeps prefill and decode apart is their interference, counted in seconds:

    prefill at p    what waits there before it (shorter prompts go first), its own tokens that p does not hold yet, and
                    that time once more for every longer prompt that must wait and every sequence whose decoding stalls
    decode at d     predicted tokens times the length of a step there, stretched by the share of its time that d lately
                    spent on prompts and by what is queued there; what each step of the others grows by; waiting for
                    memory; and, if d is not p, the transfer of what d does not hold yet

The pair with the least sum is taken (the social cost of the sequence, not its own alone). Under a burst all instances
do both, as nothing decodes yet that could be disturbed; under a steady load some come to prefill and others to decode.

Prefix (MemServe, section 5.3), prediction (TetriInfer 3.3.2), preemption (``PrefillOrder.SRF``) and roles meet in this
one sum of seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.policies.length_prediction import LengthRange

_REMEMBERS_S = 10.0  # over which time the share of prefill is averaged


@dataclass(frozen=True, slots=True)
class DelayModel:
    """What an instance's time goes into, in seconds.

    Attributes:
        prompt_token_s: for one token of a full chunk.
        chunk_tokens: of one pass.
        floor_s, sequence_s, context_token_s: of a decoding pass: whatever it does, for each sequence, and for each
            token whose keys and values are read.
        transfer_token_s: for one token's keys and values between two instances.
        kv_tokens: how many of them an instance has room for.
        first_token_weight: how much more a second before a first token counts than one between later ones, for each
            sequence that decodes at the average instance, and once more. So it keeps its weight against the stalls that
            a prompt causes, which grow with their number.
    """

    prompt_token_s: float
    chunk_tokens: int
    floor_s: float
    sequence_s: float
    context_token_s: float
    transfer_token_s: float
    kv_tokens: int
    first_token_weight: float = 1.0


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """It takes sequences."""

    instance: str


@dataclass(frozen=True, slots=True)
class InstanceLeft:
    """It takes no new ones; what it has, it may finish."""

    instance: str


@dataclass(frozen=True, slots=True)
class SequenceCame:
    """A sequence wants a route. ``prefix_tokens``: how much of its prompt an instance has; 0 where it is not named."""

    sequence: str
    prompt_tokens: int
    predicted: LengthRange
    prefix_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequencePrefilled:
    """Its first token is there."""

    sequence: str


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """It is over, in whichever way."""

    sequence: str


Event = InstanceJoined | InstanceLeft | SequenceCame | SequencePrefilled | SequenceEnded


@dataclass(frozen=True, slots=True)
class ChooseInstances:
    """Prefill here, decode there; ``cached_tokens`` of the prompt need not be computed."""

    sequence: str
    prefill: str
    decode: str
    cached_tokens: int
    reason: str


# --- the policy --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sequence:
    prefill: str
    decode: str
    uncached_tokens: int
    context_tokens: int
    prefilled: bool = False


@dataclass(slots=True)
class _Instance:
    name: str
    prompts: dict[str, int] = field(default_factory=dict)  # tokens yet to be computed here
    prompt_tokens: int = 0
    sequences: int = 0  # that decode here, or will
    decoding: int = 0  # of these, whose first token is there
    context_tokens: int = 0
    prefill_s: float = 0.0  # lately spent on prompts, weighted by age
    weighed_s: float = 0.0

    def prefill_share(self, now_s: float) -> float:
        """The share of its time that it lately spent on prompts; a little less than all of it at most."""
        return min(0.9, self.prefill_s * math.exp((self.weighed_s - now_s) / _REMEMBERS_S) / _REMEMBERS_S)

    def spend(self, seconds: float, now_s: float) -> None:
        self.prefill_s = self.prefill_s * math.exp((self.weighed_s - now_s) / _REMEMBERS_S) + seconds
        self.weighed_s = now_s


class LeastDelay:
    """Events in, routes out. Sequences that come while there is no instance wait for one."""

    def __init__(self, model: DelayModel) -> None:
        self._model = model
        self._instances: dict[str, _Instance] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: dict[str, SequenceCame] = {}

    def handle(self, event: Event, now_s: float) -> list[ChooseInstances]:
        """Take in one event; the routes that follow, the oldest sequence first."""
        match event:
            case InstanceJoined(name):
                self._forget(name)
                self._instances[name] = _Instance(name)
            case InstanceLeft(name):
                self._forget(name)
            case SequenceCame(name):
                self._end(name)
                self._waiting[name] = event
            case SequencePrefilled(name):
                self._prefilled(name)
            case SequenceEnded(name):
                self._end(name)
        if not self._waiting or not self._instances:
            return []
        routes = [self._route(came, now_s) for came in self._waiting.values()]
        self._waiting.clear()
        return routes

    def _route(self, came: SequenceCame, now_s: float) -> ChooseInstances:
        places = list(self._instances.values())
        weight = self._weight()
        prefill_s = {place.name: self._prefill_s(place, came, weight) for place in places}
        decode_s = {place.name: self._decode_s(place, came, now_s) for place in places}
        move_s = {place.name: self._uncached(came, place) * self._model.transfer_token_s for place in places}
        total_s, prefill, decode = min(
            (prefill_s[p.name] + decode_s[d.name] + (move_s[d.name] if p is not d else 0.0), p.name, d.name)
            for p in places
            for d in places
        )
        self._book(came, prefill, decode, now_s)
        reason = (
            f"{total_s:.3f} s lost: {prefill_s[prefill]:.3f} by prefill at {prefill}, "
            f"{decode_s[decode]:.3f} by decode at {decode}"
        )
        return ChooseInstances(came.sequence, prefill, decode, came.prefix_tokens.get(prefill, 0), reason)

    def _weight(self) -> float:
        """How many seconds between later tokens a second before a first one counts for now."""
        decoding = sum(place.decoding for place in self._instances.values()) / len(self._instances)
        return self._model.first_token_weight * (1 + decoding)

    def _prefill_s(self, place: _Instance, came: SequenceCame, weight: float) -> float:
        """What is lost by prefilling it there."""
        model = self._model
        tokens = self._uncached(came, place)
        # A pass with a chunk carries what decodes along.
        chunk_s = model.prompt_token_s * model.chunk_tokens
        along_s = model.sequence_s * place.decoding + model.context_token_s * self._context(place)
        token_s = model.prompt_token_s * (1 + along_s / chunk_s)
        before = sum(left for left in place.prompts.values() if left <= tokens)
        longer = sum(left > tokens for left in place.prompts.values())
        # Of its chunks' time, a sequence that decodes loses what is beyond its usual steps.
        stall = max(0.0, 1 - model.floor_s / chunk_s)
        own_s = tokens * token_s
        return weight * (before * token_s + own_s * (1 + longer)) + own_s * stall * place.decoding

    def _decode_s(self, place: _Instance, came: SequenceCame, now_s: float) -> float:
        """What is lost by decoding it there."""
        model = self._model
        steps = came.predicted.middle
        context = came.prompt_tokens + steps // 2
        step_s = (
            model.floor_s
            + model.sequence_s * (place.sequences + 1)
            + model.context_token_s * (place.context_tokens + context)
        )
        own_s = steps * step_s / (1 - place.prefill_share(now_s)) + place.prompt_tokens * model.prompt_token_s
        others_s = steps * (model.sequence_s + model.context_token_s * context) * place.sequences
        missing = place.context_tokens + context - model.kv_tokens
        # Memory comes free as fast as those there end: all of it in about the time that one of them takes.
        memory_s = own_s * missing / model.kv_tokens if missing > 0 else 0.0
        return own_s + others_s + memory_s

    def _context(self, place: _Instance) -> float:
        """What those read that decode there now, going by the mean of all that were sent there."""
        return place.context_tokens * place.decoding / place.sequences if place.sequences else 0.0

    def _uncached(self, came: SequenceCame, place: _Instance) -> int:
        return max(1, came.prompt_tokens - came.prefix_tokens.get(place.name, 0))

    def _book(self, came: SequenceCame, prefill: str, decode: str, now_s: float) -> None:
        there, then = self._instances[prefill], self._instances[decode]
        tokens = self._uncached(came, there)
        context = came.prompt_tokens + came.predicted.middle // 2
        there.prompts[came.sequence] = tokens
        there.prompt_tokens += tokens
        there.spend(tokens * self._model.prompt_token_s, now_s)
        then.sequences += 1
        then.context_tokens += context
        self._sequences[came.sequence] = _Sequence(prefill, decode, tokens, context)

    def _forget(self, instance: str) -> None:
        """What was sent there is counted nowhere any more: the name may come back with other sequences."""
        if self._instances.pop(instance, None) is None:
            return
        for sequence in self._sequences.values():
            if sequence.prefill == instance:
                sequence.prefill = ""
            if sequence.decode == instance:
                sequence.decode = ""

    def _prefilled(self, name: str) -> None:
        sequence = self._sequences.get(name)
        if sequence is None or sequence.prefilled:
            return
        sequence.prefilled = True
        there = self._instances.get(sequence.prefill)
        if there is not None and there.prompts.pop(name, None) is not None:
            there.prompt_tokens -= sequence.uncached_tokens
        if (then := self._instances.get(sequence.decode)) is not None:
            then.decoding += 1

    def _end(self, name: str) -> None:
        self._waiting.pop(name, None)
        self._prefilled(name)
        sequence = self._sequences.pop(name, None)
        if sequence is not None and (then := self._instances.get(sequence.decode)) is not None:
            then.decoding -= 1
            then.sequences -= 1
            then.context_tokens -= sequence.context_tokens
