"""What language instances have to do, as a ``FlipPolicy`` is shown it, by what is known of the routes of chats."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from common.messages.cluster import LanguageRole
from common.policies.language.flip import ChatLoad, InstanceLoad
from common.policies.language.sites import InstanceKind, Site


@dataclass(frozen=True, slots=True)
class Between:
    """A sequence with a first token and no second one.

    Attributes:
        prefill: who has its keys and values still; ``prompt_tokens``: how many.
        decode: who is to decode it; empty: nobody yet.
    """

    prefill: str
    prompt_tokens: int
    decode: str


def flip_loads(sites: Iterable[Site], between: Collection[Between], flipping: str) -> list[InstanceLoad]:
    """Those that have one role; who drains is left out.

    A prompt waits while it is not the only one at its instance, and the sequence after it until its second token comes:
    for its keys and values, and for room where it is decoded. Those that are given to nobody yet are divided among all
    that decode. A prefill instance that these fill computes nothing.

    Args:
        flipping: is on its way to another role already.
    """
    there = [site for site in sites if not site.draining]
    waiting = Counter(one.decode for one in between)
    kept = Counter[str]()
    for one in between:
        kept[one.prefill] += one.prompt_tokens
    decoding = [site.name for site in there if site.decodes]
    waiting.update({name: len(range(place, waiting[""], len(decoding))) for place, name in enumerate(decoding)})
    found = []
    for site in there:
        if site.kind is InstanceKind.FUSED:
            continue
        if site.prefills:
            role, waits = LanguageRole.PREFILL, max(0, len(site.unfinished) - 1)
            running = int(_computes(site, kept[site.name]))
        else:
            role, waits = LanguageRole.DECODE, waiting[site.name]
            running = max(0, len(site.decoding) - waits)
        found.append(
            InstanceLoad(
                site.name,
                role,
                waits,
                busy=bool(site.unfinished or site.decoding),
                flipping=site.name == flipping,
                running=running,
                room=site.kv_tokens * site.sequences // site.context_tokens if site.context_tokens else 0,
                prefilled_tokens=site.prefilled_tokens,
            )
        )
    return found


def _computes(site: Site, kept_tokens: int) -> bool:
    """Whether it has a prompt, and memory for it beside what others are to fetch.

    Where these have nothing to fetch, or its memory is not known, nothing says that it has not.
    """
    first = next(iter(site.unfinished.values()), None)
    if first is None or kept_tokens == 0 or not site.kv_tokens:
        return first is not None
    return kept_tokens + first.tokens <= site.kv_tokens


@dataclass(slots=True)
class ChatCounts:
    """What has come and been answered since the scheduler began; see ``ChatLoad`` for what counts of an answer."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    answered_tokens: int = 0

    def load(self, to_prefill: int, waiting_tokens: int, running_tokens: int) -> ChatLoad:
        """Given tokens of prompts yet to be computed, of all answers that nobody decodes yet, and of those decoded."""
        return ChatLoad(
            self.prompt_tokens,
            self.answer_tokens,
            to_prefill,
            to_decode=waiting_tokens,
            decoded_tokens=self.answered_tokens + running_tokens / 2,
        )
