"""An instance as routing rules see it, and the books of what it has yet to do.

A request bears on its prefill instance until its first token is there, and on its decode instance until its last.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

_REMEMBERS_S = 10.0  # over which time the share of prefill is averaged
_MOST_SHARE = 0.9


class InstanceKind(StrEnum):
    """MemServe's three types. ``FUSED``: its PD-colocated."""

    PREFILL = "prefill"
    DECODE = "decode"
    FUSED = "fused"

    @classmethod
    def of(cls, prefills: bool, decodes: bool) -> "InstanceKind":
        """Of an instance that does either, or both."""
        if prefills and decodes:
            return cls.FUSED
        return cls.PREFILL if prefills else cls.DECODE


@dataclass(frozen=True, slots=True)
class Prefill:
    """One that is not done: its predicted time, and the tokens that it has to compute."""

    exec_s: float
    tokens: int


@dataclass(slots=True)
class Site:
    """An instance and what it has yet to do.

    Attributes:
        kv_tokens: how many it has room for.
        draining: it takes nothing new.
        queue_s: predicted time of all prefills that are not done, the first part of MemServe's equation 1.
        left_s: the same, less what the first of them has had already.
        link_s: how long the pulls from it and to it will take yet.
        prefill_tokens: that these have yet to compute; ``prefilled_tokens``: that were computed since it came.
        contexts: of each sequence that decodes here or will, prompt and answer, in the order of their routes.
        context_tokens: of all of them; ``answer_tokens``: answers alone.
        decoding: which of them have their first token.
        cached_tokens: of the request that is being routed.
        unfinished: the prefills that are not done, in order; ``first_began_s``: since when the first of them has been
            computed, as far as can be told.
        link_until_s: until when its pulls will take.
        prefill_share: of its time, lately given to prompts; a little less than all of it at most. ``spent_s``: on them,
            weighted by age, at the time ``spent_at_s``.
    """

    name: str
    kind: InstanceKind
    kv_tokens: int
    draining: bool = False
    queue_s: float = 0.0
    left_s: float = 0.0
    link_s: float = 0.0
    prefill_tokens: int = 0
    prefilled_tokens: int = 0
    context_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    contexts: dict[str, int] = field(default_factory=dict)
    decoding: set[str] = field(default_factory=set)
    unfinished: dict[str, Prefill] = field(default_factory=dict)
    first_began_s: float = 0.0
    link_until_s: float = 0.0
    prefill_share: float = 0.0
    spent_s: float = 0.0
    spent_at_s: float = 0.0

    @property
    def sequences(self) -> int:
        """How many decode here or will."""
        return len(self.contexts)

    @property
    def prefills(self) -> bool:
        return self.kind is not InstanceKind.DECODE

    @property
    def decodes(self) -> bool:
        return self.kind is not InstanceKind.PREFILL

    def look(self, now_s: float, cached_tokens: int) -> None:
        """Now, for a request of which so many tokens are here."""
        self.cached_tokens = cached_tokens
        self.link_s = max(0.0, self.link_until_s - now_s)
        first_s = next((prefill.exec_s for prefill in self.unfinished.values()), 0.0)
        self.left_s = self.queue_s - min(first_s, now_s - self.first_began_s)
        self.prefill_share = min(_MOST_SHARE, self._spent_s(now_s) / _REMEMBERS_S)

    def take_prefill(self, request_id: str, exec_s: float, tokens: int, now_s: float) -> None:
        """It is prefilled here, after those that are."""
        if not self.unfinished:
            self.first_began_s = now_s
        self.unfinished[request_id] = Prefill(exec_s, tokens)
        self.queue_s += exec_s
        self.prefill_tokens += tokens
        self.spent_s, self.spent_at_s = self._spent_s(now_s) + exec_s, now_s

    def _spent_s(self, now_s: float) -> float:
        return self.spent_s * math.exp((self.spent_at_s - now_s) / _REMEMBERS_S)

    def end_prefill(self, request_id: str, now_s: float, done: bool = True) -> float | None:
        """It is ``done``, or given up.

        Returns:
            For how many seconds it has been the one that is computed, as far as can be told; None: it is not here.
        """
        first = next(iter(self.unfinished), None)
        prefill = self.unfinished.pop(request_id, None)
        if prefill is None:
            return None
        took_s = now_s - self.first_began_s
        if done or first == request_id:
            self.first_began_s = now_s
        if done:
            self.prefilled_tokens += prefill.tokens
        self.prefill_tokens -= prefill.tokens
        # Sums of floating-point numbers rarely end at zero.
        self.queue_s = self.queue_s - prefill.exec_s if self.unfinished else 0.0
        return took_s

    def take_decode(self, request_id: str, context_tokens: int, answer_tokens: int) -> None:
        """It will decode here."""
        self.contexts[request_id] = context_tokens
        self.context_tokens += context_tokens
        self.answer_tokens += answer_tokens

    def begin_decode(self, request_id: str) -> None:
        """Its first token is there; nothing if it does not decode here."""
        if request_id in self.contexts:
            self.decoding.add(request_id)

    def end_decode(self, request_id: str, answer_tokens: int) -> None:
        """It does not any more; nothing if it never did."""
        context_tokens = self.contexts.pop(request_id, None)
        if context_tokens is not None:
            self.context_tokens -= context_tokens
            self.answer_tokens -= answer_tokens
            self.decoding.discard(request_id)


def occupy_links(source: Site, target: Site, send_s: float, now_s: float) -> float:
    """A pull from the one to the other begins when both their links are free. When it will be over."""
    until_s = max(now_s, source.link_until_s, target.link_until_s) + send_s
    source.link_until_s = target.link_until_s = until_s
    return until_s


def free_links(source: Site, target: Site, until_s: float, now_s: float) -> None:
    """It is over, and was to be then: what no later pull uses is free."""
    for site in (source, target):
        if site.link_until_s <= until_s:
            site.link_until_s = min(site.link_until_s, now_s)
