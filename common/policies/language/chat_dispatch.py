"""Which prefill and which decode instance gets a chat's sequence: by a rule, of what instances have yet to do.

Without another rule it is ``chat_rule.FewestTokens``. Load is what is still to come: prompts at the prefill instance
until the first token is there, answers, as long as they may become, at the decode instance until the sequence ends. It
is known here without asking anybody, and is forgotten with the gateway that holds the sequence. What an instance has
cached of a prompt it need not compute (MemServe, section 6). An instance that does both (fused) bears both.

Departure from TetriInfer: there the global scheduler never picks the decode instance. Here it does, unless prefill
instances choose (``dispatched``), who may know more of the answer's length.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from common.messages.cluster import LanguageRole
from common.policies.language.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    Event,
    GatewayHolds,
    GatewayLost,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    PrefixPulled,
    RolesChanged,
    RouteSequence,
)
from common.policies.language.chat_loads import Between, ChatCounts, flip_loads
from common.policies.language.chat_rule import ChatRule, Chosen, FewestTokens, guessed_costs
from common.policies.language.flip import ChatLoad, InstanceLoad
from common.policies.language.sites import InstanceKind, Site, free_links, occupy_links

# A route, what is pulled for it included, is at its gateway after so long, or is waited for no more.
_ON_ITS_WAY_S = 10.0


@dataclass(slots=True)
class _Routed:
    """A sequence that has its route, since ``routed_s``.

    ``decode``: where its answer counts; empty: nowhere. ``prefilled``: its first token has come; ``between``: and no
    other yet, so that it waits to be decoded. ``link_from_s``, ``link_until_s``: when what it pulls was to be on its
    way, from and to ``ends``.
    """

    gateway: str
    epoch: int
    prefill: str
    decode: str
    answer_tokens: int
    context_tokens: int
    chosen: Chosen
    routed_s: float
    prefilled: bool = False
    between: bool = False
    link_from_s: float = 0.0
    link_until_s: float = 0.0
    ends: tuple[Site, Site] | None = None


def _fewest_tokens() -> ChatRule:
    return ChatRule(FewestTokens(), guessed_costs(2000.0, 20_000.0))


@dataclass(slots=True)
class ChatDispatch:
    """Events in, decisions with reasons out. Times are of one clock that never goes back.

    Attributes:
        next_epoch: of the first route; each later one is higher.
        rule: by which to choose, and what it knows.
        dispatched: whether prefill instances choose who decodes (TetriInfer, section 3.3.4): then nobody is named here,
            and what is to be generated counts nowhere before it is known who generates it.
    """

    next_epoch: int = 1
    rule: ChatRule = field(default_factory=_fewest_tokens)
    dispatched: bool = False
    _counts: ChatCounts = field(default_factory=ChatCounts)
    _sites: dict[str, Site] = field(default_factory=dict)
    _routed: dict[str, _Routed] = field(default_factory=dict)
    _waiting: dict[str, ChatArrived] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many sequences wait for an instance."""
        return len(self._waiting)

    def load(self, instance: str) -> tuple[int, int]:
        """The tokens yet to be prefilled and yet to be generated there."""
        site = self._sites[instance]
        return site.prefill_tokens, site.answer_tokens

    def loads(self, flipping: str = "") -> list[InstanceLoad]:
        """See ``chat_loads.flip_loads``."""
        between = [
            Between(routed.prefill, routed.context_tokens - routed.answer_tokens, routed.decode)
            for routed in self._routed.values()
            if routed.between
        ]
        return flip_loads(self._sites.values(), between, flipping)

    def chats(self) -> ChatLoad:
        """See ``ChatLoad``."""
        running = sum(one.answer_tokens for one in self._routed.values() if one.prefilled and not one.between)
        waiting = sum(one.answer_tokens for one in self._routed.values()) - running
        return self._counts.load(sum(site.prefill_tokens for site in self._sites.values()), waiting, running)

    def decoding(self, but: str) -> list[str]:
        """Who decodes, ``but`` one, the least to generate first."""
        there = [site for site in self._sites.values() if site.decodes and not site.draining and site.name != but]
        return [site.name for site in sorted(there, key=lambda site: (site.answer_tokens, site.name))]

    def handle(self, happened: Event, now_s: float) -> list[RouteSequence]:
        """Take in what happened; what follows from it, the oldest sequence first."""
        match happened:
            case InstanceJoined(name, roles, kv_tokens):
                self._forget_instance(name)
                self._sites[name] = Site(name, _kind(roles), kv_tokens)
            case RolesChanged(name, roles):
                if (site := self._sites.get(name)) is not None:
                    site.kind = _kind(roles)
            case InstanceDraining(name):
                if (site := self._sites.get(name)) is not None:
                    site.draining = True
            case InstanceLost(name):
                self._forget_instance(name)
            case ChatArrived(request_id):
                self._end(request_id, now_s)
                self._waiting[request_id] = happened
            case PrefixPulled(request_id, epoch, tokens):
                routed = self._routed.get(request_id)
                if routed is not None and routed.epoch == epoch:
                    self._pulled(routed, tokens, now_s)
            case ChatPrefilled(request_id, epoch, decode, decoding):
                routed = self._routed.get(request_id)
                if routed is not None and routed.epoch == epoch:
                    self._prefilled(request_id, routed, now_s)
                    if decode:
                        self._goes_on(request_id, routed, decode)
                    routed.prefilled = True
                    routed.between = not decoding and routed.prefill != routed.decode
            case ChatEnded(request_id, epoch):
                routed = self._routed.get(request_id)
                if epoch is None or (routed is not None and routed.epoch == epoch):
                    self._end(request_id, now_s)
            case GatewayHolds(gateway, epochs):
                routed_before_s = now_s - _ON_ITS_WAY_S
                for request_id, routed in list(self._routed.items()):
                    named = routed.gateway != gateway or routed.epoch in epochs
                    if not named and routed.routed_s < routed_before_s:
                        self._end(request_id, now_s)
            case GatewayLost(gateway):
                held = [name for name, routed in self._routed.items() if routed.gateway == gateway]
                held += [name for name, arrived in self._waiting.items() if arrived.gateway == gateway]
                for request_id in held:
                    self._end(request_id, now_s)
        return self._route_waiting(now_s)

    def _route_waiting(self, now_s: float) -> list[RouteSequence]:
        if not self._waiting:
            return []
        there = [site for site in self._sites.values() if not site.draining]
        prefills = [site for site in there if site.prefills]
        decodes = [site for site in there if site.decodes]
        if not prefills or not decodes:
            return []
        waiting = sorted(self._waiting.values(), key=lambda arrived: arrived.created_s)
        self._waiting.clear()
        return [
            self._route(arrived, _without(prefills, arrived.avoid), _without(decodes, arrived.avoid), now_s)
            for arrived in waiting
        ]

    def _route(
        self, arrived: ChatArrived, prefills: Sequence[Site], decodes: Sequence[Site], now_s: float
    ) -> RouteSequence:
        chosen = self.rule.choose(arrived, prefills, decodes, now_s)
        prefill, pull = chosen.choice.prefill, chosen.pull
        # Who decodes too keeps what it prefills.
        decode = None if self.dispatched and prefill is not chosen.choice.decode else chosen.choice.decode
        request_id, answer_tokens = arrived.request_id, arrived.max_tokens
        routed = _Routed(
            arrived.gateway,
            self.next_epoch,
            prefill.name,
            decode.name if decode is not None else "",
            answer_tokens,
            self.rule.costs.whole_blocks(arrived.prompt_tokens + answer_tokens),
            chosen,
            now_s,
        )
        self.next_epoch += 1
        if pull is not None:
            source = self._sites[pull.source]
            routed.ends = (source, prefill)
            routed.link_until_s = occupy_links(source, prefill, chosen.pull_s, now_s)
            routed.link_from_s = routed.link_until_s - chosen.pull_s
        prefill.take_prefill(request_id, chosen.exec_s, arrived.prompt_tokens - chosen.cached_tokens, now_s)
        self._counts.prompt_tokens += arrived.prompt_tokens - chosen.cached_tokens
        self._counts.answer_tokens += answer_tokens
        if decode is not None:
            decode.take_decode(request_id, routed.context_tokens, answer_tokens)
        self._routed[request_id] = routed
        return RouteSequence(request_id, routed.epoch, prefill.name, routed.decode, chosen.choice.reason, pull)

    def _pulled(self, routed: _Routed, tokens: int, now_s: float) -> None:
        if (pull := routed.chosen.pull) is None or routed.ends is None:
            return
        # Those of then: who has come back under the same name has other pulls.
        free_links(*routed.ends, routed.link_until_s, now_s)
        fitted_s = self.rule.costs.send_s(tokens or pull.to_token - pull.from_token)
        took_s = now_s - routed.link_from_s
        # What was refused at once, or ended by a death, says nothing of the link; what has not come in time says more
        # than what has.
        live = all(self._sites.get(end.name) is end for end in routed.ends)
        if tokens or (live and took_s > fitted_s):
            self.rule.pulls.saw(fitted_s, took_s, now_s)

    def _prefilled(self, request_id: str, routed: _Routed, now_s: float) -> None:
        if (site := self._sites.get(routed.decode)) is not None:
            site.begin_decode(request_id)
        if (site := self._sites.get(routed.prefill)) is None:
            return
        took_s = site.end_prefill(request_id, now_s)
        # What was pulled may have come too late, and is computed then.
        if took_s is not None and routed.chosen.pull is None:
            self.rule.prefills.saw(routed.chosen.fitted_s, took_s)

    def _goes_on(self, request_id: str, routed: _Routed, decode: str) -> None:
        """Count what is to be generated where it is generated; nowhere, if that is nobody who is known."""
        if (before := self._sites.get(routed.decode)) is not None:
            before.end_decode(request_id, routed.answer_tokens)
        routed.decode = ""
        if (now := self._sites.get(decode)) is not None:
            routed.decode = decode
            now.take_decode(request_id, routed.context_tokens, routed.answer_tokens)
            now.begin_decode(request_id)

    def _end(self, request_id: str, now_s: float) -> None:
        self._waiting.pop(request_id, None)
        routed = self._routed.pop(request_id, None)
        if routed is None:
            return
        if routed.prefilled:
            self._counts.answered_tokens += routed.answer_tokens
        if (site := self._sites.get(routed.prefill)) is not None:
            site.end_prefill(request_id, now_s, done=False)
        if (site := self._sites.get(routed.decode)) is not None:
            site.end_decode(request_id, routed.answer_tokens)

    def _forget_instance(self, name: str) -> None:
        """What ran there bears on nobody any more; its gateways ask for new routes. The name may come back."""
        if self._sites.pop(name, None) is None:
            return
        for routed in self._routed.values():
            if routed.decode == name:
                routed.decode = ""


def _kind(roles: Collection[LanguageRole]) -> InstanceKind:
    return InstanceKind.of(LanguageRole.PREFILL in roles, LanguageRole.DECODE in roles)


def _without(sites: Sequence[Site], avoid: Collection[str]) -> Sequence[Site]:
    """Those not to be avoided; all, if there is no other."""
    return [site for site in sites if site.name not in avoid] or sites
