"""Which prefill and which decode instance gets a chat's sequence: the least loaded, or by a rule of ``routing_rules``.

The former is ours, in the place of TetriInfer's global scheduler (section 3.2); ``chat_rule`` has the latter.

Load is counted in tokens that are still to come: prompt tokens at the prefill instance until the first token is there,
and the most that may yet be generated at the decode instance until the sequence ends. What an instance has cached of a
prompt it need not compute (MemServe, section 6): a prompt goes where what waits and what it lacks are least together.
Load is known here without asking anybody, and is forgotten with the gateway that holds the sequence. An instance that
does both (fused) bears both, and keeps what it has prefilled: handing over would only cost.

Departure from TetriInfer: there the global scheduler never picks the decode instance. Here it does, unless prefill
instances are to choose (``dispatched``).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from common.messages.cluster import LanguageRole
from common.policies.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    Event,
    GatewayLost,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    RouteSequence,
)
from common.policies.chat_rule import ChatRule, Chosen, Instance, Routed, choose_by_rule


@dataclass(slots=True)
class ChatDispatch:
    """Events in, decisions with reasons out.

    Attributes:
        next_epoch: of the first route; each later one is higher.
        rule: by which to choose; None: the fewest tokens to prefill.
        dispatched: whether prefill instances choose who decodes (TetriInfer, section 3.3.4): then nobody is named here,
            and what is to be generated counts nowhere before it is known who generates it.
    """

    next_epoch: int = 1
    rule: ChatRule | None = None
    dispatched: bool = False
    _instances: dict[str, Instance] = field(default_factory=dict)
    _routed: dict[str, Routed] = field(default_factory=dict)
    _waiting: dict[str, ChatArrived] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many sequences wait for an instance."""
        return len(self._waiting)

    def load(self, instance: str) -> tuple[int, int]:
        """The tokens yet to be prefilled and yet to be generated there."""
        there = self._instances[instance]
        return there.prefill_tokens, there.decode_tokens

    def handle(self, happened: Event) -> list[RouteSequence]:
        """Take in what happened; what follows from it, the oldest sequence first."""
        match happened:
            case InstanceJoined(name, roles):
                self._forget_instance(name)
                self._instances[name] = Instance(name, LanguageRole.PREFILL in roles, LanguageRole.DECODE in roles)
            case InstanceDraining(name):
                if name in self._instances:
                    self._instances[name].draining = True
            case InstanceLost(name):
                self._forget_instance(name)
            case ChatArrived(request_id):
                self._end(request_id)
                self._waiting[request_id] = happened
            case ChatPrefilled(request_id, epoch, decode):
                routed = self._routed.get(request_id)
                if routed is not None and routed.epoch == epoch:
                    self._prefilled(routed)
                    if decode:
                        self._goes_on(routed, decode)
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

    def _route(self, arrived: ChatArrived, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> RouteSequence:
        if self.rule is None:
            chosen = _least_to_prefill(arrived, prefills, decodes)
        else:
            chosen = choose_by_rule(self.rule, arrived, prefills, decodes, self._routed)
        prefill = chosen.prefill
        # Who decodes too keeps what it prefills.
        decode = None if self.dispatched and prefill is not chosen.decode else chosen.decode
        lacking = arrived.prompt_tokens - min(chosen.cached_tokens, arrived.prompt_tokens - 1)
        context_tokens = arrived.prompt_tokens + arrived.max_tokens
        routed = Routed(
            arrived.gateway,
            self.next_epoch,
            prefill.name,
            decode.name if decode is not None else "",
            lacking,
            arrived.max_tokens,
            chosen.exec_s,
            context_tokens,
        )
        self.next_epoch += 1
        prefill.prefill_tokens += routed.prefill_tokens
        if decode is not None:
            decode.decode_tokens += routed.decode_tokens
        self._routed[arrived.request_id] = routed
        return RouteSequence(arrived.request_id, routed.epoch, prefill.name, routed.decode, chosen.reason, chosen.pull)

    def _prefilled(self, routed: Routed) -> None:
        if (instance := self._instances.get(routed.prefill)) is not None:
            instance.prefill_tokens -= routed.prefill_tokens
        routed.prefill_tokens = 0

    def _goes_on(self, routed: Routed, decode: str) -> None:
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


def _least_to_prefill(arrived: ChatArrived, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> Chosen:
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
    return Chosen(prefill, decode, cached, f"{what}: {load}")


def _without(instances: Sequence[Instance], avoid: Collection[str]) -> Sequence[Instance]:
    """Those not to be avoided; all, if there is no other."""
    return [instance for instance in instances if instance.name not in avoid] or instances
