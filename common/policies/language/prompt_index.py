"""An index that tells the truth: instances publish what their memory gains and loses, and the scheduler follows.

In MemServe (arXiv 2406.17565, sections 6 and 10) the global trees learn only from answers that pass by, hear nothing of
evictions, and let entries die of age. That is here as ``PromptIndex.expect``. Ours beyond it: every change comes with a
number, the life of its instance (incarnation) and what the instance then has as numbers (``Holding``). A gap, a
restart or a difference is noticed with the next change at the latest, and repaired by a snapshot.

An instance's own match is the authority in any case: a view that is behind costs time, never a wrong answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from common.policies.language.prompt_tree import Holding, PromptTree

# Changes that are kept while a snapshot is on its way. Beyond them another snapshot will be asked for.
_MAX_HELD = 4096

# --- what instances publish --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexChange:
    """An instance's memory gained or lost something.

    Attributes:
        incarnation: higher with every start of the instance.
        number: counts the changes of one incarnation from 1.
        tokens: packed, whole blocks, from the first token on.
        kept_blocks: None: all of ``tokens`` is there now. Otherwise no more of them than so many, and nothing else that
            begins with one block more.
        after: what the instance has with this change.
    """

    instance: str
    incarnation: int
    number: int
    tokens: bytes
    kept_blocks: int | None
    after: Holding


@dataclass(frozen=True, slots=True)
class IndexSnapshot:
    """All that an instance has after its change ``number`` (0: before the first)."""

    instance: str
    incarnation: int
    number: int
    sequences: tuple[bytes, ...]
    after: Holding


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Decision: the view of this instance is to be repaired."""

    instance: str
    reason: str


class IndexPublisher:
    """An instance's side: knows what it has told."""

    def __init__(self, instance: str, incarnation: int, block_bytes: int) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._number = 0
        self._tree = PromptTree(block_bytes)

    def inserted(self, tokens: bytes) -> IndexChange:
        """These are there now."""
        self._tree.insert(self._instance, tokens)
        return self._change(tokens, None)

    def evicted(self, tokens: bytes, kept_blocks: int) -> IndexChange:
        """Of these only the first are left."""
        self._tree.remove(self._instance, tokens, kept_blocks)
        return self._change(tokens, kept_blocks)

    def snapshot(self) -> IndexSnapshot:
        """Everything, for a view that is to be repaired."""
        has = tuple(self._tree.sequences(self._instance))
        return IndexSnapshot(self._instance, self._incarnation, self._number, has, self._tree.holding(self._instance))

    def _change(self, tokens: bytes, kept_blocks: int | None) -> IndexChange:
        self._number += 1
        after = self._tree.holding(self._instance)
        return IndexChange(self._instance, self._incarnation, self._number, tokens, kept_blocks, after)


# --- the scheduler's view ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Viewed:
    """How far one instance has been followed. ``awaited``: whether a snapshot is; ``holding``: what it has, as told."""

    instance: str
    incarnation: int
    number: int
    awaited: bool
    holding: Holding


@dataclass(slots=True)
class _Followed:
    """One instance, as far as its changes have been taken in. ``awaited``: whether a snapshot is."""

    incarnation: int
    number: int = 0
    awaited: bool = False
    held: list[IndexChange] = field(default_factory=list)


class PromptIndex:
    """What all instances have, as far as the scheduler knows.

    Args:
        block_bytes: of the packed tokens of a block.
        ttl_s: what is only expected is forgotten after so many seconds at most, and after half of them at least, unless
            it is expected anew.
    """

    def __init__(self, block_bytes: int, ttl_s: float = 120.0) -> None:
        self.repairs = 0
        self._told = PromptTree(block_bytes)
        self._expected = PromptTree(block_bytes)
        self._ttl_s = ttl_s
        self._expired_s = 0.0
        self._followed: dict[str, _Followed] = {}

    @property
    def block_bytes(self) -> int:
        return self._told.block_bytes

    def match(self, tokens: bytes, now_s: float) -> dict[str, int]:
        """How many blocks of the beginning of ``tokens`` each instance has, or is expected to have."""
        if now_s - self._expired_s >= self._ttl_s / 2:
            self._expired_s = now_s
            self._expected.expire()
        found = self._told.match(tokens)
        for instance, blocks in self._expected.match(tokens).items():
            if blocks > found.get(instance, 0):
                found[instance] = blocks
        return found

    def told(self, tokens: bytes) -> dict[str, int]:
        """The same without what is only expected."""
        return self._told.match(tokens)

    def expect(self, instance: str, tokens: bytes) -> None:
        """The instance will have these; or has them and publishes nothing, and an answer passed by (section 6)."""
        self._expected.insert(instance, tokens)

    def forget(self, instance: str) -> None:
        """The instance is gone."""
        self._followed.pop(instance, None)
        self._told.forget(instance)
        self._expected.forget(instance)

    def handle(self, told: IndexChange | IndexSnapshot) -> list[AskSnapshot]:
        """Take in what an instance published. Whether a snapshot comes that was asked for, the caller has to see to."""
        if isinstance(told, IndexSnapshot):
            return self._restore(told)
        source = self._followed.get(told.instance)
        if source is None or told.incarnation > source.incarnation:
            self.forget(told.instance)
            source = self._followed[told.instance] = _Followed(told.incarnation)
        if told.incarnation < source.incarnation or told.number <= source.number:
            return []
        if source.awaited:
            if len(source.held) < _MAX_HELD:
                source.held.append(told)
            return []
        return self._take(source, told)

    def holding(self, instance: str) -> Holding:
        """What the instance has told, as numbers."""
        return self._told.holding(instance)

    def views(self) -> list[Viewed]:
        """Every instance that has told anything."""
        return [
            Viewed(instance, source.incarnation, source.number, source.awaited, self._told.holding(instance))
            for instance, source in self._followed.items()
        ]

    def _take(self, source: _Followed, told: IndexChange) -> list[AskSnapshot]:
        """Apply the next change, or find that it is not the next."""
        if told.number != source.number + 1:
            source.held = [told]
            return self._ask(source, told.instance, f"change {told.number} came after {source.number}")
        source.number = told.number
        if told.kept_blocks is None:
            self._told.insert(told.instance, told.tokens)
        else:
            self._told.remove(told.instance, told.tokens, told.kept_blocks)
            self._expected.remove(told.instance, told.tokens, told.kept_blocks)
        if self._told.holding(told.instance) != told.after:
            return self._ask(source, told.instance, f"after change {told.number} it has something else")
        return []

    def _restore(self, snapshot: IndexSnapshot) -> list[AskSnapshot]:
        source = self._followed.setdefault(snapshot.instance, _Followed(snapshot.incarnation, awaited=True))
        if snapshot.incarnation < source.incarnation:
            return []
        if snapshot.incarnation == source.incarnation and (not source.awaited or snapshot.number < source.number):
            return []
        self._told.forget(snapshot.instance)
        for sequence in snapshot.sequences:
            self._told.insert(snapshot.instance, sequence)
        source.incarnation, source.number, source.awaited = snapshot.incarnation, snapshot.number, False
        held, source.held = source.held, []
        if self._told.holding(snapshot.instance) != snapshot.after:
            return self._ask(source, snapshot.instance, "its snapshot is not what it says")
        return self._take_held(source, held)

    def _take_held(self, source: _Followed, held: Iterable[IndexChange]) -> list[AskSnapshot]:
        """What came while the snapshot was on its way."""
        asked: list[AskSnapshot] = []
        for told in held:
            if told.incarnation != source.incarnation or told.number <= source.number:
                continue
            if asked:
                source.held.append(told)
            else:
                asked = self._take(source, told)
        return asked

    def _ask(self, source: _Followed, instance: str, reason: str) -> list[AskSnapshot]:
        self.repairs += 1
        source.awaited = True
        return [AskSnapshot(instance, reason)]
