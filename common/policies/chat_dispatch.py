"""Which prefill and which decode instance gets a chat's sequence: the least loaded, or by a rule of ``routing_rules``.

The former is ours, in the place of TetriInfer's global scheduler (section 3.2) until its predictor and dispatcher are
there. For the latter (MemServe, section 6) the load is put as ``routing.Site`` has it, with what is not known left out:
how long a prefill has been at it, and how long pulls will take yet.

Load is counted in tokens that are still to come: prompt tokens at the prefill instance until the first token is there,
and the most that may yet be generated at the decode instance until the sequence ends. What an instance has cached of a
prompt it need not compute (MemServe, section 6): a prompt goes where what waits and what it lacks are least together.
Load is known here without asking anybody, and is forgotten with the gateway that holds the sequence. An instance that
does both (fused) bears both, and keeps what it has prefilled: handing over would only cost.

Departure from TetriInfer: there the global scheduler never picks the decode instance. Here it does, as long as there is
no prediction of the answer's length by which the prefill instance would do better.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from common.messages.cluster import LanguageRole
from common.policies.flip import InstanceLoad
from common.policies.routing import Ask, Costs, InstanceKind, Pull, RequestArrived, Rule, Site

# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """A language worker takes sequences."""

    instance: str
    roles: tuple[LanguageRole, ...]


@dataclass(frozen=True, slots=True)
class RolesChanged:
    """It takes other sequences from now on; what it has, it has still."""

    instance: str
    roles: tuple[LanguageRole, ...]


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """It takes no new ones; what it has goes on."""

    instance: str


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """It is gone with all it had."""

    instance: str


@dataclass(frozen=True, slots=True)
class ChatArrived:
    """A sequence waits for a route: a new one, or one that lost its former route, which this one takes the place of.

    ``created_s``: when its client asked; of what waits, the oldest goes first. ``avoid``: instances to be taken only
    where there is no other. ``cached``: how many tokens of the prompt's beginning instances have. ``conversation``:
    requests of one conversation carry the same; empty: it is one of its own.
    """

    request_id: str
    gateway: str
    created_s: float
    prompt_tokens: int
    max_tokens: int
    avoid: tuple[str, ...] = ()
    cached: Mapping[str, int] = field(default_factory=dict)
    conversation: str = ""

    def lacking(self, instance: str) -> int:
        """How many tokens would have to be prefilled there; the last one always has."""
        return self.prompt_tokens - min(self.cached.get(instance, 0), self.prompt_tokens - 1)


@dataclass(frozen=True, slots=True)
class ChatPrefilled:
    """The sequence's first token has come.

    Said again when who decodes it changes, and when tokens come from there. ``decode``: who goes on with it now; empty:
    that is not known.
    """

    request_id: str
    epoch: int
    decode: str = ""
    decoding: bool = False


@dataclass(frozen=True, slots=True)
class ChatEnded:
    """The sequence, or its waiting, is over. ``epoch`` None: whatever route it has, or waits for."""

    request_id: str
    epoch: int | None


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """Nobody waits any more for what this gateway held."""

    gateway: str


Event = (
    InstanceJoined
    | RolesChanged
    | InstanceDraining
    | InstanceLost
    | ChatArrived
    | ChatPrefilled
    | ChatEnded
    | GatewayLost
)

# --- decisions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteSequence:
    """Have the sequence prefilled at ``prefill`` and decoded at ``decode``, once ``prefill`` has what it is to pull."""

    request_id: str
    epoch: int
    prefill: str
    decode: str
    reason: str
    pull: Pull | None = None


# --- the policy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatRule:
    """A rule, and what it is told of the machines, all alike; ``kv_tokens``: how many each has room for."""

    rule: Rule
    costs: Costs
    kv_tokens: int


@dataclass(slots=True)
class _Instance:
    name: str
    prefills: bool
    decodes: bool
    draining: bool = False
    prefill_tokens: int = 0
    decode_tokens: int = 0

    @property
    def kind(self) -> InstanceKind:
        if self.prefills and self.decodes:
            return InstanceKind.FUSED
        return InstanceKind.PREFILL if self.prefills else InstanceKind.DECODE


@dataclass(slots=True)
class _Routed:
    """``decode``: at whom ``decode_tokens`` are counted; empty: at nobody."""

    gateway: str
    epoch: int
    prefill: str
    decode: str
    prefill_tokens: int
    decode_tokens: int
    exec_s: float = 0.0
    context_tokens: int = 0
    # Whether it waits to be decoded: its first token has come, and no other.
    between: bool = False


@dataclass(frozen=True, slots=True)
class _Chosen:
    """``cached_tokens``: of the prompt, at ``prefill`` by the time that it begins; ``exec_s``: of what is left."""

    prefill: _Instance
    decode: _Instance
    cached_tokens: int
    reason: str
    exec_s: float = 0.0
    pull: Pull | None = None


@dataclass(slots=True)
class ChatDispatch:
    """Events in, decisions with reasons out.

    Attributes:
        next_epoch: of the first route; each later one is higher.
        rule: by which to choose; None: the fewest tokens to prefill.
    """

    next_epoch: int = 1
    rule: ChatRule | None = None
    _instances: dict[str, _Instance] = field(default_factory=dict)
    _routed: dict[str, _Routed] = field(default_factory=dict)
    _waiting: dict[str, ChatArrived] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many sequences wait for an instance."""
        return len(self._waiting)

    def load(self, instance: str) -> tuple[int, int]:
        """The tokens yet to be prefilled and yet to be generated there."""
        there = self._instances[instance]
        return there.prefill_tokens, there.decode_tokens

    def loads(self, flipping: str = "") -> list[InstanceLoad]:
        """How those instances are that have one role, for a ``FlipPolicy``; who drains is left out.

        A prompt waits while it is not the only one at its instance, a sequence after it until its second token comes.
        ``flipping``: this one is on its way to another role already.
        """
        prompts: Counter[str] = Counter()
        between: Counter[str] = Counter()
        decoding: Counter[str] = Counter()
        for routed in self._routed.values():
            prompts[routed.prefill] += routed.prefill_tokens > 0
            between[routed.decode] += routed.between
            decoding[routed.decode] += not routed.prefill_tokens
        found = []
        for there in self._instances.values():
            if there.draining or there.prefills == there.decodes:
                continue
            name = there.name
            role = LanguageRole.PREFILL if there.prefills else LanguageRole.DECODE
            waiting = max(0, prompts[name] - 1) if there.prefills else between[name]
            busy = bool(prompts[name] or decoding[name])
            found.append(InstanceLoad(name, role, waiting, busy, name == flipping))
        return found

    def decoding(self, but: str) -> list[str]:
        """Who decodes, ``but`` one, the least to generate first."""
        there = [one for one in self._instances.values() if one.decodes and not one.draining and one.name != but]
        return [one.name for one in sorted(there, key=lambda one: (one.decode_tokens, one.name))]

    def handle(self, happened: Event) -> list[RouteSequence]:
        """Take in what happened; what follows from it, the oldest sequence first."""
        match happened:
            case InstanceJoined(name, roles):
                self._forget_instance(name)
                self._instances[name] = _Instance(name, LanguageRole.PREFILL in roles, LanguageRole.DECODE in roles)
            case RolesChanged(name, roles):
                if (there := self._instances.get(name)) is not None:
                    there.prefills, there.decodes = LanguageRole.PREFILL in roles, LanguageRole.DECODE in roles
            case InstanceDraining(name):
                if name in self._instances:
                    self._instances[name].draining = True
            case InstanceLost(name):
                self._forget_instance(name)
            case ChatArrived(request_id):
                self._end(request_id)
                self._waiting[request_id] = happened
            case ChatPrefilled(request_id, epoch, decode, decoding):
                routed = self._routed.get(request_id)
                if routed is not None and routed.epoch == epoch:
                    self._prefilled(routed)
                    if decode:
                        self._goes_on(routed, decode)
                    routed.between = not decoding and routed.prefill != routed.decode
            case ChatEnded(request_id, epoch):
                routed = self._routed.get(request_id)
                if epoch is None or (routed is not None and routed.epoch == epoch):
                    self._end(request_id)
            case GatewayLost(gateway):
                held = [name for name, routed in self._routed.items() if routed.gateway == gateway]
                held += [name for name, arrived in self._waiting.items() if arrived.gateway == gateway]
                for request_id in held:
                    self._end(request_id)
        return self._route_waiting()

    def _route_waiting(self) -> list[RouteSequence]:
        if not self._waiting:
            return []
        prefills = [there for there in self._instances.values() if there.prefills and not there.draining]
        decodes = [there for there in self._instances.values() if there.decodes and not there.draining]
        if not prefills or not decodes:
            return []
        waiting = sorted(self._waiting.values(), key=lambda arrived: arrived.created_s)
        self._waiting.clear()
        return [
            self._route(arrived, _without(prefills, arrived.avoid), _without(decodes, arrived.avoid))
            for arrived in waiting
        ]

    def _route(
        self, arrived: ChatArrived, prefills: Sequence[_Instance], decodes: Sequence[_Instance]
    ) -> RouteSequence:
        if self.rule is None:
            chosen = _least_to_prefill(arrived, prefills, decodes)
        else:
            chosen = self._by_rule(self.rule, arrived, prefills, decodes)
        prefill, decode = chosen.prefill, chosen.decode
        lacking = arrived.prompt_tokens - min(chosen.cached_tokens, arrived.prompt_tokens - 1)
        context_tokens = arrived.prompt_tokens + arrived.max_tokens
        routed = _Routed(
            arrived.gateway,
            self.next_epoch,
            prefill.name,
            decode.name,
            lacking,
            arrived.max_tokens,
            chosen.exec_s,
            context_tokens,
        )
        self.next_epoch += 1
        prefill.prefill_tokens += routed.prefill_tokens
        decode.decode_tokens += routed.decode_tokens
        self._routed[arrived.request_id] = routed
        return RouteSequence(arrived.request_id, routed.epoch, prefill.name, decode.name, chosen.reason, chosen.pull)

    def _by_rule(
        self, by: ChatRule, arrived: ChatArrived, prefills: Sequence[_Instance], decodes: Sequence[_Instance]
    ) -> _Chosen:
        there = {instance.name: instance for instance in (*prefills, *decodes)}
        sites = self._sites(by, there, arrived.cached)
        ask = Ask(
            RequestArrived(
                arrived.request_id,
                arrived.conversation or arrived.request_id,
                b"",
                arrived.prompt_tokens,
                arrived.max_tokens,
            ),
            by.costs,
        )
        choice = by.rule.choose(
            ask, [sites[instance.name] for instance in prefills], [sites[instance.name] for instance in decodes]
        )
        cached = choice.pull.to_token if choice.pull is not None else choice.prefill.cached_tokens
        prefill, decode = there[choice.prefill.name], there[choice.decode.name]
        return _Chosen(prefill, decode, cached, choice.reason, ask.exec_s(cached) + choice.wait_s, choice.pull)

    def _sites(self, by: ChatRule, there: Mapping[str, _Instance], cached: Mapping[str, int]) -> dict[str, Site]:
        """What a rule is shown of these instances."""
        sites = {
            name: Site(name, instance.kind, by.kv_tokens, cached_tokens=cached.get(name, 0))
            for name, instance in there.items()
        }
        for request_id, routed in self._routed.items():
            site = sites.get(routed.prefill)
            if site is not None and routed.prefill_tokens:
                site.unfinished[request_id] = routed.exec_s
                site.queue_s += routed.exec_s
                site.left_s = site.queue_s
                site.prefill_tokens += routed.prefill_tokens
            site = sites.get(routed.decode)
            if site is not None and routed.decode_tokens:
                site.contexts[request_id] = by.costs.whole_blocks(routed.context_tokens)
                site.context_tokens += site.contexts[request_id]
                site.answer_tokens += routed.decode_tokens
        return sites

    def _prefilled(self, routed: _Routed) -> None:
        if (instance := self._instances.get(routed.prefill)) is not None:
            instance.prefill_tokens -= routed.prefill_tokens
        routed.prefill_tokens = 0

    def _goes_on(self, routed: _Routed, decode: str) -> None:
        """Count what is to be generated where it is generated; nowhere, if that is nobody who is known."""
        if (before := self._instances.get(routed.decode)) is not None:
            before.decode_tokens -= routed.decode_tokens
        now = self._instances.get(decode)
        if now is not None:
            now.decode_tokens += routed.decode_tokens
        routed.decode = now.name if now is not None else ""

    def _end(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        routed = self._routed.pop(request_id, None)
        if routed is not None:
            self._prefilled(routed)
            self._goes_on(routed, "")

    def _forget_instance(self, name: str) -> None:
        """What ran there bears on nobody any more; its gateways ask for new routes."""
        if self._instances.pop(name, None) is None:
            return
        for routed in self._routed.values():
            # The name may come back with other sequences, which these must not be counted against.
            if routed.prefill == name:
                routed.prefill_tokens = 0
            if routed.decode == name:
                routed.decode = ""


def _least_to_prefill(arrived: ChatArrived, prefills: Sequence[_Instance], decodes: Sequence[_Instance]) -> _Chosen:
    prefill = min(
        prefills,
        key=lambda there: (there.prefill_tokens + arrived.lacking(there.name), there.decode_tokens, there.name),
    )
    cached = arrived.prompt_tokens - arrived.lacking(prefill.name)
    if prefill in decodes:
        decode = prefill
        what = f"least to prefill of {len(prefills)}, and decodes too"
    else:
        decode = min(decodes, key=lambda there: (there.decode_tokens, there.prefill_tokens, there.name))
        what = f"least to prefill of {len(prefills)}, least to generate of {len(decodes)}"
    load = f"{prefill.prefill_tokens} tokens to prefill, {decode.decode_tokens} to generate before it"
    if cached:
        load += f"; {cached} of its {arrived.prompt_tokens} tokens are there"
    return _Chosen(prefill, decode, cached, f"{what}: {load}")


def _without(instances: Sequence[_Instance], avoid: Collection[str]) -> Sequence[_Instance]:
    """Those not to be avoided; all, if there is no other."""
    return [instance for instance in instances if instance.name not in avoid] or instances
