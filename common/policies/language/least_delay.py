"""A routing rule: prefill and decode where all sequences together lose the least time. Ours.

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

from collections.abc import Sequence
from dataclasses import dataclass

from common.policies.language.routing import Ask, Choice
from common.policies.language.sites import Site


@dataclass(frozen=True, slots=True)
class LeastDelay:
    """Fused sites, too, may hand over to one another.

    ``first_token_weight``: how much more a second before a first token counts than one between later ones, for each
    sequence that decodes at the average instance, and once more. So it keeps its weight against the stalls that a
    prompt causes, which grow with their number.
    """

    first_token_weight: float = 6.0

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        weight = self._weight(prefills, decodes)
        prefill_s = {site.name: _prefill_s(ask, site, weight) for site in prefills}
        decode_s = {site.name: _decode_s(ask, site) for site in decodes}
        move_s = {site.name: ask.costs.send_s(_uncached(ask, site)) for site in decodes}
        total_s, _, _, prefill, decode = min(
            (
                (prefill_s[p.name] + decode_s[d.name] + (move_s[d.name] if p is not d else 0.0), p.name, d.name, p, d)
                for p in prefills
                for d in decodes
            ),
            key=lambda pair: pair[:3],
        )
        reason = (
            f"{total_s:.3f} s lost: {prefill_s[prefill.name]:.3f} by prefill at {prefill.name}, "
            f"{decode_s[decode.name]:.3f} by decode at {decode.name}"
        )
        return Choice(prefill, decode, None, reason)

    def _weight(self, prefills: Sequence[Site], decodes: Sequence[Site]) -> float:
        """How many seconds between later tokens a second before a first one counts for now."""
        sites = {site.name: site for site in (*prefills, *decodes)}
        return self.first_token_weight * (1 + sum(len(site.decoding) for site in sites.values()) / len(sites))


def _prefill_s(ask: Ask, site: Site, weight: float) -> float:
    """What is lost by prefilling it there."""
    chunk_s, decode, decoding = ask.costs.chunk_s, ask.costs.decode, len(site.decoding)
    tokens = _uncached(ask, site)
    # A pass with a chunk carries what decodes along: of all that were sent there, the mean.
    along = _context(site) * decoding / site.sequences if site.sequences else 0.0
    along_s = decode.sequence_s * decoding + decode.context_token_s * along
    token_s = ask.costs.prompt_token_s * (1 + along_s / chunk_s)
    ahead = [prefill.tokens for prefill in site.unfinished.values()]
    before = sum(left for left in ahead if left <= tokens)
    longer = sum(left > tokens for left in ahead)
    # Of its chunks' time, a sequence that decodes loses what is beyond its usual steps.
    stall = max(0.0, 1 - decode.floor_s / chunk_s)
    own_s = tokens * token_s
    return weight * (before * token_s + own_s * (1 + longer)) + own_s * stall * decoding


def _decode_s(ask: Ask, site: Site) -> float:
    """What is lost by decoding it there."""
    decode, steps = ask.costs.decode, ask.request.answer_tokens
    context, there = ask.request.prompt_tokens + steps / 2, _context(site)
    step_s = decode.step_s(site.sequences + 1, there + context)
    own_s = steps * step_s / (1 - site.prefill_share) + site.prefill_tokens * ask.costs.prompt_token_s
    others_s = steps * (decode.sequence_s + decode.context_token_s * context) * site.sequences
    missing = there + context - site.kv_tokens
    # Memory comes free as fast as those there end: all of it in about the time that one of them takes.
    memory_s = own_s * missing / site.kv_tokens if missing > 0 else 0.0
    return own_s + others_s + memory_s


def _context(site: Site) -> float:
    """What those look back at that decode there or will, in the midst of their answers."""
    return site.context_tokens - site.answer_tokens / 2


def _uncached(ask: Ask, site: Site) -> int:
    return max(1, ask.request.prompt_tokens - site.cached_tokens)
