"""The rules of MemServe's global scheduler (arXiv 2406.17565, sections 5.3 and 6, table 6), a baseline, and ours.

Ties go to the least loaded instance, then to the first name, so that the same events always give the same routes.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.policies.language.routing import Ask, Choice, Pull, Rule
from common.policies.language.sites import InstanceKind, Site

_MAX_CONVERSATIONS = 100_000
# Among decode instances the longest match wins as long as it has at most so many tokens more to look back at than the
# least loaded one, as a share of its memory (ours: the paper does not say how they are chosen).
_DECODE_LOAD_GAP = 0.25


class UnknownRule(ValueError):
    """There is no routing rule of that name; the message says which there are."""


class RoundRobin:
    """One after the other; decode instances likewise. The first bar of figure 15."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        prefill = prefills[self._turn % len(prefills)]
        decode = prefill if prefill.kind is InstanceKind.FUSED else decodes[self._turn % len(decodes)]
        self._turn += 1
        return Choice(prefill, decode, None, "its turn")


class LeastLoad:
    """The instance with the fewest tokens to prefill; of those, the one with the fewest to look back at."""

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        prefill = min(prefills, key=_load)
        decode = prefill if prefill.kind is InstanceKind.FUSED else min(decodes, key=_context)
        return Choice(prefill, decode, None, f"least to prefill: {prefill.prefill_tokens} tokens")


class Session:
    """Where the conversation was before; a new one goes to the least loaded instance."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, str] = OrderedDict()

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        conversation = ask.request.conversation
        before = self._last.pop(conversation, None)
        known = next((site for site in prefills if site.name == before), None)
        prefill = known or min(prefills, key=_load)
        self._last[conversation] = prefill.name
        if len(self._last) > _MAX_CONVERSATIONS:
            self._last.popitem(last=False)
        reason = "its conversation was here" if known else f"a new conversation, {prefill.prefill_tokens} tokens before"
        return Choice(prefill, choose_decode(prefill, decodes), None, reason)


class LongestPrefix:
    """The longest common prefix (section 6); of equal ones, the least loaded instance."""

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        prefill = min(prefills, key=lambda site: (-site.cached_tokens, *_load(site)))
        reason = f"longest prefix: {prefill.cached_tokens} tokens"
        return Choice(prefill, choose_decode(prefill, decodes), None, reason)


class LeastCost:
    """Equation 1, then equation 2: the least of queue and execution, and what a faster transfer is worth.

    Ours where the paper is silent: a prefill-only instance also costs the hand-over of what the decode instance lacks,
    so that a fused instance gets what is not worth taking apart.
    """

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        def cost(site: Site) -> tuple[float, int, str]:
            spent_s = site.queue_s + ask.exec_s(site.cached_tokens)
            if site.kind is InstanceKind.PREFILL:
                lacks = ask.request.prompt_tokens - choose_decode(site, decodes).cached_tokens
                spent_s += ask.costs.send_s(lacks)
            return spent_s, -site.cached_tokens, site.name

        prefill = min(prefills, key=cost)
        pull = worthwhile_pull(ask, prefill, [*prefills, *decodes])
        reason = f"least cost: {cost(prefill)[0]:.3f} s, {prefill.cached_tokens} tokens cached"
        return Choice(prefill, choose_decode(prefill, decodes), pull, reason)


class Dynamo:
    """The cost function of NVIDIA Dynamo's router as documented, with its defaults: blocks to prefill, this request's
    and those before it, and blocks that decode, this request's included. No pulls, no times."""

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        block, prompt = ask.costs.block_tokens, ask.request.prompt_tokens

        def cost(site: Site) -> tuple[float, str]:
            to_prefill = site.prefill_tokens + prompt - site.cached_tokens
            return (to_prefill + site.context_tokens + prompt) / block, site.name

        prefill = min(prefills, key=cost)
        decode = prefill if prefill.kind is InstanceKind.FUSED else min(decodes, key=_context)
        return Choice(prefill, decode, None, f"least blocks: {cost(prefill)[0]:.0f}")


@dataclass(frozen=True, slots=True)
class AddedTime:
    """Ours: the least time added to all requests together, this one's included.

    That is equation 1 with what it leaves out: a pull is weighed where it would be made, not after the choice; a
    prefill holds up every sequence that decodes beside it; and the request slows the batch that it decodes with, as
    that slows it. So a fused instance is left alone where it would hold up many, and a hand-over is made where it pays.

    ``first_token``: how many times the wait for the first token counts. More than twice (for that token and for the
    last one) since a request that waits is one that others will wait for.
    """

    first_token: float = 6.0

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        source = min([*prefills, *decodes], key=lambda site: (-site.cached_tokens, site.link_s, *_context(site)))
        best: tuple[float, str] | None = None
        choice: Choice | None = None
        for site in prefills:
            pull, cached, start_s = None, site.cached_tokens, 0.0
            if source.cached_tokens > cached:
                send_s = ask.costs.send_s(source.cached_tokens - cached)
                if send_s + ask.exec_s(source.cached_tokens) < ask.exec_s(cached):
                    pull, cached, start_s = (
                        Pull(source.name, cached, source.cached_tokens),
                        source.cached_tokens,
                        send_s,
                    )
            decode = choose_decode(site, decodes)
            start_s = max(site.left_s, start_s, _room_s(ask, decode))
            added_s = self._added_s(ask, site, decode, cached, start_s)
            if best is None or (added_s, site.name) < best:
                best = added_s, site.name
                reason = f"least time added: {added_s:.3f} s, {cached} tokens cached"
                choice = Choice(site, decode, pull, reason, wait_s=max(0.0, start_s - site.left_s))
        assert choice is not None
        return choice

    def _added_s(self, ask: Ask, site: Site, decode: Site, cached_tokens: int, start_s: float) -> float:
        exec_s, costs, answer = ask.exec_s(cached_tokens), ask.costs.decode, ask.request.answer_tokens
        context = ask.request.prompt_tokens + answer / 2
        added_s = self.first_token * (start_s + exec_s)
        if decode is site:
            # The prefill stops those that decode here, those that wait for theirs included.
            added_s += exec_s * site.sequences
        else:
            added_s += ask.costs.send_s(ask.request.prompt_tokens - decode.cached_tokens)
        own_step_s = costs.step_s(decode.sequences + 1, decode.context_tokens + context)
        slower_s = costs.sequence_s + costs.context_token_s * context
        return added_s + answer * (own_step_s + decode.sequences * slower_s)


RULES: dict[str, Callable[[], Rule]] = {
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "session": Session,
    "prompt_tree": LongestPrefix,
    "cost": LeastCost,
    "dynamo": Dynamo,
    "added_time": AddedTime,
}


def make_rule(name: str, rules: Mapping[str, Callable[[], Rule]] = RULES) -> Rule:
    """One of ``rules``. Raises: UnknownRule."""
    if name not in rules:
        raise UnknownRule(f"there is no routing rule {name!r}: use one of {', '.join(rules)}")
    return rules[name]()


def choose_decode(prefill: Site, decodes: Sequence[Site]) -> Site:
    """The longest match, unless it has much more to do than the least loaded; a fused instance keeps what it has."""
    if prefill.kind is InstanceKind.FUSED:
        return prefill
    least = min(decodes, key=_context)
    longest = min(decodes, key=lambda site: (-site.cached_tokens, *_context(site)))
    gap = longest.context_tokens - least.context_tokens
    return longest if gap <= _DECODE_LOAD_GAP * longest.kv_tokens else least


def worthwhile_pull(ask: Ask, prefill: Site, sites: Sequence[Site]) -> Pull | None:
    """Equation 2: the longest match elsewhere whose transfer is faster than computing it."""
    cached = prefill.cached_tokens
    for site in sorted(sites, key=lambda site: (-site.cached_tokens, site.name)):
        if site.cached_tokens <= cached:
            break
        gain_s = ask.exec_s(cached) - ask.exec_s(site.cached_tokens)
        if ask.costs.send_s(site.cached_tokens - cached) <= gain_s:
            return Pull(site.name, cached, site.cached_tokens)
    return None


def _room_s(ask: Ask, site: Site) -> float:
    """About how long until enough of what decodes there has ended for the request to have room."""
    need = ask.costs.whole_blocks(ask.request.prompt_tokens + ask.request.answer_tokens)
    lacking = site.context_tokens + need - ask.costs.whole_blocks(site.kv_tokens - ask.costs.block_tokens + 1)
    if lacking <= 0 or not site.contexts:
        return 0.0
    # Who ends when is not known. Let each have as much ahead as an answer takes on average, by chance: then the first
    # of n ends after 1/n of that time, the next after 1/(n - 1) more.
    answer_s = site.answer_tokens / site.sequences * ask.costs.decode.step_s(site.sequences, site.context_tokens)
    left, wait_s = site.sequences, 0.0
    for context_tokens in site.contexts.values():
        wait_s += answer_s / left
        left -= 1
        lacking -= context_tokens
        if lacking <= 0:
            break
    return wait_s


def _load(site: Site) -> tuple[int, int, str]:
    return site.prefill_tokens, site.context_tokens, site.name


def _context(site: Site) -> tuple[int, int, str]:
    return site.context_tokens, site.sequences, site.name
