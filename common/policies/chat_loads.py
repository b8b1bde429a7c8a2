"""How language instances are, as a ``FlipPolicy`` is shown them, by what the routes of chats are known to have done."""

from collections import Counter
from collections.abc import Iterable

from common.messages.cluster import LanguageRole
from common.policies.chat_rule import Instance, Routed
from common.policies.flip import InstanceLoad


def flip_loads(instances: Iterable[Instance], routed: Iterable[Routed], flipping: str) -> list[InstanceLoad]:
    """Those that have one role; who drains is left out.

    A prompt waits while it is not the only one at its instance, and the sequence after it until its second token comes:
    for its keys and values, and for room where it is decoded. Those that are given to nobody yet are divided among all
    that decode. ``flipping`` is on its way to another role already.
    """
    prompts: Counter[str] = Counter()
    between: Counter[str] = Counter()
    decoding: Counter[str] = Counter()
    for sequence in routed:
        prompts[sequence.prefill] += sequence.prefill_tokens > 0
        between[sequence.decode] += sequence.between
        decoding[sequence.decode] += not sequence.prefill_tokens
    instances = list(instances)
    names = [there.name for there in instances if there.decodes and not there.draining]
    between.update({name: len(range(place, between[""], len(names))) for place, name in enumerate(names)})
    found = []
    for there in instances:
        if there.draining or there.prefills == there.decodes:
            continue
        name = there.name
        role = LanguageRole.PREFILL if there.prefills else LanguageRole.DECODE
        waiting = max(0, prompts[name] - 1) if there.prefills else between[name]
        found.append(InstanceLoad(name, role, waiting, bool(prompts[name] or decoding[name]), name == flipping))
    return found
