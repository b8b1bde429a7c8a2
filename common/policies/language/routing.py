"""MemServe's global scheduler (arXiv 2406.17565, sections 5.3 and 6): which instances compute a request.

It keeps the prompt index and a table of what every instance has yet to do, matches all kinds of instances at once, and
leaves the choice to a rule (``routing_rules``). What it decides is a hint: the instance's own match is the authority.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Protocol

from common.policies.language.prefill_cost import DecodeCost, LinkCost, PrefillCost, ScaledCost
from common.policies.language.prompt_index import IndexChange, IndexSnapshot, PromptIndex
from common.policies.language.sites import InstanceKind, Site, occupy_links

# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """It takes requests, and has nothing in its memory. ``kv_tokens``: how many it has room for."""

    instance: str
    kind: InstanceKind
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """It is gone with all it had; who waits for its answers asks again."""

    instance: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A request waits for a route.

    Attributes:
        conversation: requests of one conversation carry the same.
        tokens: its prompt, packed.
        answer_tokens: how many it will probably have.
    """

    request_id: str
    conversation: str
    tokens: bytes
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class RequestPrefilled:
    """Its first token is there."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Its last token is there, or nobody waits for it any more."""

    request_id: str


Event = InstanceJoined | InstanceLost | RequestArrived | RequestPrefilled | RequestEnded


# --- decisions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pull:
    """Before prefill, get the keys and values of these tokens from ``source`` (section 5.3, equation 2)."""

    source: str
    from_token: int
    to_token: int


@dataclass(frozen=True, slots=True)
class Route:
    """Prefill there, decode there. ``cached_tokens``: how many need not be computed, what is pulled included."""

    request_id: str
    prefill: str
    decode: str
    cached_tokens: int
    pull: Pull | None
    reason: str


# --- what rules see ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of the machines, all alike. ``chunk_tokens``: how much of prompts a pass computes at most."""

    prefill: PrefillCost
    decode: DecodeCost
    link: LinkCost
    kv_token_bytes: int
    block_tokens: int
    chunk_tokens: int = 512

    @property
    def chunk_s(self) -> float:
        """Of one pass over a full chunk."""
        return self.prefill.exec_s(self.chunk_tokens, 0)

    @property
    def prompt_token_s(self) -> float:
        """Of one token of it."""
        return self.chunk_s / self.chunk_tokens

    def whole_blocks(self, tokens: int) -> int:
        """So many tokens, rounded up."""
        return math.ceil(tokens / self.block_tokens) * self.block_tokens

    def send_s(self, tokens: int) -> float:
        """Keys and values of so many tokens, to another instance."""
        return self.link.send_s(tokens * self.kv_token_bytes, math.ceil(tokens / self.block_tokens))

    def corrected(self, prefill: float, send_s: float) -> "Costs":
        """With prefills that take so many times as long, and transfers that take so much longer."""
        link = replace(self.link, once_s=self.link.once_s + send_s)
        return replace(self, prefill=ScaledCost(self.prefill, prefill), link=link)


class Ask:
    """One request's question to a rule: the request, what it costs where."""

    def __init__(self, request: RequestArrived, costs: Costs) -> None:
        self.request = request
        self.costs = costs
        self.exec_s = cache(self._exec_s)

    def _exec_s(self, cached_tokens: int) -> float:
        """Its prefill, if so many of its tokens need not be computed. At least the last one is."""
        tokens = self.request.prompt_tokens
        return self.costs.prefill.exec_s(tokens, min(cached_tokens, tokens - 1))


@dataclass(frozen=True, slots=True)
class Choice:
    """What a rule answers. ``decode`` is ``prefill`` where that is fused.

    ``wait_s``: how long its prefill will wait for something else than those before it, as far as the rule knows. It
    holds up those after it.
    """

    prefill: Site
    decode: Site
    pull: Pull | None
    reason: str
    wait_s: float = 0.0


class Rule(Protocol):
    """How to choose. It may remember what it chose, and must not change what it is given."""

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        """One of each; neither is empty, and all fused sites are in both."""


# --- the scheduler -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Routed:
    route: Route
    exec_s: float
    computed_tokens: int
    context_tokens: int
    answer_tokens: int
    prefilled: bool = False


@dataclass(slots=True)
class GlobalScheduler:
    """Events in, routes out. What instances publish goes to ``published``.

    Attributes:
        expects: what is routed to an instance counts as cached there until it publishes it (ours; the paper learns of
            it when the answer passes by). Two requests in flight with the same new beginning then meet.
    """

    rule: Rule
    index: PromptIndex
    costs: Costs
    expects: bool = True
    sites: dict[str, Site] = field(default_factory=dict)
    _routed: dict[str, _Routed] = field(default_factory=dict)
    _waiting: list[RequestArrived] = field(default_factory=list)

    def handle(self, happened: Event, now_s: float) -> list[Route]:
        """Take in what happened; the routes that follow from it."""
        match happened:
            case InstanceJoined(name, kind, kv_tokens):
                self._lose(name, now_s)
                self.sites[name] = Site(name, kind, kv_tokens)
            case InstanceLost(name):
                self._lose(name, now_s)
            case RequestArrived():
                self._end(happened.request_id, now_s)
                self._waiting.append(happened)
            case RequestPrefilled(request_id):
                if (routed := self._routed.get(request_id)) is not None:
                    self._end_prefill(routed, now_s)
            case RequestEnded(request_id):
                self._end(request_id, now_s)
        return self._route_waiting(now_s) if self._waiting else []

    def published(self, told: IndexChange | IndexSnapshot) -> list[str]:
        """Take in what an instance published; of which instances a snapshot is needed."""
        return [asked.instance for asked in self.index.handle(told)]

    def _route_waiting(self, now_s: float) -> list[Route]:
        prefills = [site for site in self.sites.values() if site.prefills]
        decodes = [site for site in self.sites.values() if site.decodes]
        if not prefills or not decodes:
            return []
        waiting, self._waiting = self._waiting, []
        return [self._route(request, prefills, decodes, now_s) for request in waiting]

    def _route(self, request: RequestArrived, prefills: Sequence[Site], decodes: Sequence[Site], now_s: float) -> Route:
        matched = self.index.match(request.tokens, now_s)
        for name, site in self.sites.items():
            site.look(now_s, matched.get(name, 0) * self.costs.block_tokens)
        ask = Ask(request, self.costs)
        choice = self.rule.choose(ask, prefills, decodes)
        cached = choice.pull.to_token if choice.pull is not None else choice.prefill.cached_tokens
        route = Route(request.request_id, choice.prefill.name, choice.decode.name, cached, choice.pull, choice.reason)
        routed = _Routed(
            route,
            ask.exec_s(cached) + choice.wait_s,
            request.prompt_tokens - cached,
            self.costs.whole_blocks(request.prompt_tokens + request.answer_tokens),
            request.answer_tokens,
        )
        if choice.pull is not None:
            send_s = self.costs.send_s(choice.pull.to_token - choice.pull.from_token)
            occupy_links(self.sites[choice.pull.source], choice.prefill, send_s, now_s)
        choice.prefill.take_prefill(request.request_id, routed.exec_s, routed.computed_tokens, now_s)
        choice.decode.take_decode(request.request_id, routed.context_tokens, routed.answer_tokens)
        self._routed[request.request_id] = routed
        if self.expects:
            self.index.expect(route.prefill, request.tokens)
        return route

    def _end_prefill(self, routed: _Routed, now_s: float, done: bool = True) -> None:
        routed.prefilled = True
        if done and (decode := self.sites.get(routed.route.decode)) is not None:
            decode.begin_decode(routed.route.request_id)
        if (site := self.sites.get(routed.route.prefill)) is not None:
            site.end_prefill(routed.route.request_id, now_s, done)

    def _end(self, request_id: str, now_s: float) -> None:
        self._waiting = [request for request in self._waiting if request.request_id != request_id]
        routed = self._routed.pop(request_id, None)
        if routed is None:
            return
        self._end_prefill(routed, now_s, done=False)
        if (site := self.sites.get(routed.route.decode)) is not None:
            site.end_decode(request_id, routed.answer_tokens)

    def _lose(self, name: str, now_s: float) -> None:
        """What ran there bears on nobody any more, nor on another of the same name."""
        self.index.forget(name)
        if self.sites.pop(name, None) is None:
            return
        for request_id, routed in list(self._routed.items()):
            route = routed.route
            if route.decode == name or (route.prefill == name and not routed.prefilled):
                self._end(request_id, now_s)
