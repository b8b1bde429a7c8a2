"""How language instances are, as a ``FlipPolicy`` is shown them, by what the routes of chats are known to have done."""

from collections import Counter
from collections.abc import Iterable

from common.messages.cluster import LanguageRole
from common.policies.flip import InstanceLoad
from common.policies.sites import InstanceKind, Site


def flip_loads(sites: Iterable[Site], between: Iterable[str], flipping: str) -> list[InstanceLoad]:
    """Those that have one role; who drains is left out.

    A prompt waits while it is not the only one at its instance, and the sequence after it until its second token comes:
    for its keys and values, and for room where it is decoded. Those that are given to nobody yet are divided among all
    that decode.

    Args:
        between: for each sequence with a first token and no second one, who decodes it; empty: nobody yet.
        flipping: is on its way to another role already.
    """
    there = [site for site in sites if not site.draining]
    waiting = Counter(between)
    decoding = [site.name for site in there if site.decodes]
    waiting.update({name: len(range(place, waiting[""], len(decoding))) for place, name in enumerate(decoding)})
    found = []
    for site in there:
        if site.kind is InstanceKind.FUSED:
            continue
        role = LanguageRole.PREFILL if site.prefills else LanguageRole.DECODE
        waits = max(0, len(site.unfinished) - 1) if site.prefills else waiting[site.name]
        busy = bool(site.unfinished or site.decoding)
        found.append(InstanceLoad(site.name, role, waits, busy, site.name == flipping))
    return found
