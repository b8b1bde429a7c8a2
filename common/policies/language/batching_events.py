"""What ``ContinuousBatching`` is told of one instance's sequences, and what it decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SequenceArrived:
    """A sequence waits to be computed.

    Attributes:
        tokens: how many it has.
        most_tokens: how many it may come to have, those included.
        computed: of how many of them it brings the keys and values, and in how many blocks: then it need not wait.
            With no blocks it waits for some like any other, into which those keys and values then come.
        expected_tokens: how many it is predicted to come to have; 0: nothing is predicted.
    """

    sequence: str
    tokens: int
    most_tokens: int
    computed: int = 0
    blocks: int = 0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SequenceComing:
    """Blocks are set aside for a sequence that is handed over to here, until it leaves, under this name.

    ``tokens`` and ``expected_tokens`` are as in ``SequenceArrived``: that is how it comes in.
    """

    sequence: str
    tokens: int
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LengthPredicted:
    """A sequence that is here is predicted to come to have so many tokens."""

    sequence: str
    expected_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceLeft:
    """Somebody cancelled it, and its blocks are free; or it is no more on its way here."""

    sequence: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The step is done: every sequence whose last token it computed has one more, but for those that are at their end.

    The blocks of sequences at their end are free.
    """

    ended: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What of a waiting sequence somebody else has computed.

    Attributes:
        tokens: its first so many are in blocks that it may share; whole blocks, and not all it has. Of one that is
            brought back from elsewhere they need not be whole: the last one comes as a new block.
        held_blocks: how many of those others hold too, so that sharing them takes none of the free ones.
        awaited: much of the rest is just being computed by another sequence: it waits for that.
    """

    tokens: int = 0
    held_blocks: int = 0
    awaited: bool = False


@dataclass(frozen=True, slots=True)
class StepDue:
    """The model has nothing to do. ``free_blocks`` are those that could be given out now.

    The answer is a step, nothing at all, or one sequence to preempt. Then ask again, with what is free after that:
    blocks that others share, or that are being read, do not become free with one holder less.

    ``cached``: of those who wait, what is in shared blocks (MemServe, section 5). Those that nobody holds are among the
    free ones until they are shared.
    """

    free_blocks: int
    cached: Mapping[str, CachedPrefix] = field(default_factory=dict)


Event = SequenceArrived | SequenceComing | LengthPredicted | SequenceLeft | StepFinished | StepDue


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `start` + `count` of a sequence.

    Attributes:
        new_blocks: how many blocks to give it before, beside the shared ones of its first ``start`` tokens where it
            holds none yet.
        last: whether they are the last it has, so that the next token follows from them.
    """

    sequence: str
    start: int
    count: int
    new_blocks: int
    last: bool


@dataclass(frozen=True, slots=True)
class RunStep:
    """Compute these in one pass."""

    pieces: tuple[Piece, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class PreemptSequence:
    """Take its blocks; it will be computed again from its first token, those it has generated included."""

    sequence: str
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseSequence:
    """It can never be computed here."""

    sequence: str
    reason: str


Decision = RunStep | PreemptSequence | RefuseSequence
