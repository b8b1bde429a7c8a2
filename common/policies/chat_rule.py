"""A chat's instances by one of ``routing_rules`` (MemServe, section 6): the load put as a rule is shown it.

What is not known is left out: how long a prefill has been at it, and how long pulls will take yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.policies.chat_events import ChatArrived
from common.policies.routing import Ask, Costs, InstanceKind, Pull, RequestArrived, Rule, Site


@dataclass(frozen=True, slots=True)
class ChatRule:
    """A rule, and what it is told of the machines, all alike; ``kv_tokens``: how many each has room for."""

    rule: Rule
    costs: Costs
    kv_tokens: int


@dataclass(slots=True)
class Instance:
    """A language instance, and the tokens yet to be prefilled and yet to be generated there."""

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
class Routed:
    """A sequence that has its route; what it has yet to do at either instance, in tokens.

    ``decode``: at whom ``decode_tokens`` are counted; empty: at nobody. ``between``: its first token has come, and no
    other yet, so that it waits to be decoded.
    """

    gateway: str
    epoch: int
    prefill: str
    decode: str
    prefill_tokens: int
    decode_tokens: int
    exec_s: float = 0.0
    context_tokens: int = 0
    between: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """``cached_tokens``: of the prompt, at ``prefill`` by the time that it begins; ``exec_s``: of what is left."""

    prefill: Instance
    decode: Instance
    cached_tokens: int
    reason: str
    exec_s: float = 0.0
    pull: Pull | None = None


def choose_by_rule(
    by: ChatRule,
    arrived: ChatArrived,
    prefills: Sequence[Instance],
    decodes: Sequence[Instance],
    routed: Mapping[str, Routed],
) -> Chosen:
    """One instance of each, neither being empty. ``routed``: all that runs, by its name."""
    there = {instance.name: instance for instance in (*prefills, *decodes)}
    sites = _sites(by, there, arrived.cached, routed)
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
    return Chosen(prefill, decode, cached, choice.reason, ask.exec_s(cached) + choice.wait_s, choice.pull)


def _sites(
    by: ChatRule, there: Mapping[str, Instance], cached: Mapping[str, int], routed: Mapping[str, Routed]
) -> dict[str, Site]:
    """What a rule is shown of these instances."""
    sites = {
        name: Site(name, instance.kind, by.kv_tokens, cached_tokens=cached.get(name, 0))
        for name, instance in there.items()
    }
    for request_id, sequence in routed.items():
        site = sites.get(sequence.prefill)
        if site is not None and sequence.prefill_tokens:
            site.unfinished[request_id] = sequence.exec_s
            site.queue_s += sequence.exec_s
            site.left_s = site.queue_s
            site.prefill_tokens += sequence.prefill_tokens
        site = sites.get(sequence.decode)
        if site is not None and sequence.decode_tokens:
            site.contexts[request_id] = by.costs.whole_blocks(sequence.context_tokens)
            site.context_tokens += site.contexts[request_id]
            site.answer_tokens += sequence.decode_tokens
    return sites
