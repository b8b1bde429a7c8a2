"""A chat: what gateway, scheduler, prefill and decode say to one another about one sequence of tokens.

Workers know token ids only; text is the gateway's. A request with several answers is several sequences, each with an id
of its own. An **epoch** is one attempt at a sequence: a higher one takes the place of all before, and whatever belongs
to a lower one is ignored by everyone. Positions count the answer's tokens from 0, over all attempts.
"""

import sys
from array import array
from collections.abc import Iterable
from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from common.messages.base import Message
from common.messages.failures import Failure
from common.messages.tensors import TensorRef

_TOKEN_BYTES = 4


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian unsigned 32-bit integers.

    Raises:
        OverflowError: one is negative or needs more than 32 bits.
    """
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The ids that ``pack_tokens`` packed.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def tokens_in(data: bytes | bytearray) -> int:
    """How many ids are packed in ``data``."""
    return len(data) // _TOKEN_BYTES


class Sampling(Message):
    """How the next token is chosen. The defaults choose freely from the model's own distribution.

    ``temperature`` 0: always the likeliest token. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave nothing out. The
    penalties count the answer's tokens, ``repetition_penalty`` the prompt's too.

    The token at a position depends on the tokens before it, on ``seed`` and on the position, and on nothing else: not
    on the epoch, the instance or what else is computed beside it. So a sequence goes on elsewhere as it would here.

    ``logprobs``: how many of the likeliest tokens are told beside each chosen one; None: no log-probabilities at all.
    They are natural logarithms of the model's own distribution, before temperature and penalties. ``max_tokens`` bounds
    the whole answer, over all epochs. ``stop_token_ids`` end it beside the model's own end tokens; ``ignore_end``
    switches the model's own off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(default=0, ge=0)
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int
    logprobs: int | None = Field(default=None, ge=0)
    stop_token_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    max_tokens: int = Field(ge=1)


# --- gateway and scheduler ---------------------------------------------------------------------------------------


class RouteChat(Message):
    """Where shall this sequence be computed? Asked anew for every attempt, and answered when there is an instance.

    ``prompt_tokens`` is all that must be prefilled, tokens of the answer from before included, and ``tokens`` are
    these, packed; empty: what they are is not said. ``max_tokens`` is what may yet be generated. ``avoid`` names
    instances to be taken only where there is no other; ``gone`` those at which nobody answered. After ``wait_s``
    seconds without an instance the answer is a failure; whoever asks again keeps the place in the queue that
    ``created_at_s`` (Unix, when the client's request came) gives. ``conversation``: the client's name of it, if any.
    """

    request_id: str
    gateway: str
    tokens: bytes = Field(default=b"", repr=False)
    prompt_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    avoid: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    wait_s: float
    created_at_s: float
    conversation: str = ""


class ChatRoute(Message):
    """``prefill`` computes the first token and hands over to ``decode``. If both are the same, it does both.

    ``decode`` empty: ``prefill`` chooses (TetriInfer, section 3.3.4); ``cached`` is then what instances that decode
    have of the prompt, in tokens. ``best_cached_tokens``: so many of the prompt's keys and values the instance had that
    had the most of them.
    """

    request_id: str
    epoch: int
    prefill: str
    decode: str
    reason: str
    best_cached_tokens: int = Field(default=0, ge=0)
    cached: tuple[tuple[str, int], ...] = ()


class ChatPrefilled(Message):
    """The first token has come: the prefill instance is free of this sequence.

    Said anew each time that another instance goes on, and once the second token has come. ``decode``: who goes on;
    empty: nobody has said yet. ``decoding``: whether tokens come from another instance than the first.
    """

    request_id: str
    epoch: int
    decode: str = ""
    decoding: bool = False


class ChatEnded(Message):
    """The sequence is finished, given up, or no longer wanted. Without ``epoch``: whatever route it has or awaits."""

    request_id: str
    epoch: int | None = None


class ChatsUnderWay(Message):
    """Said by a gateway every few seconds: all routes that it has, by their epochs.

    ``ChatEnded`` is heard at most once. What the gateway does not name is over, unless its route is still on its way.
    """

    gateway: str
    epochs: tuple[int, ...]


# --- gateway and language workers --------------------------------------------------------------------------------


class GenerateTokens(Message):
    """Go on with this sequence. ``tokens`` (``pack_tokens``) are the prompt and then ``generated`` of the answer.

    The latter count as answer in penalties, positions and ``max_tokens``. Tokens go to ``gateway`` as they come, the
    first at position ``generated``. ``created_at_s`` (Unix) is when the client's request came. ``decode``, ``cached``:
    see ``ChatRoute``.
    """

    request_id: str
    epoch: int
    tokens: bytes
    generated: int = Field(default=0, ge=0)
    sampling: Sampling
    gateway: str
    decode: str
    created_at_s: float
    cached: tuple[tuple[str, int], ...] = ()


MOVED = "moved"
"""The code of a failure that is none: the instance has another role now, and the sequence is to be routed anew."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class TokenLogprobs(Message):
    """The chosen token's log-probability, and the likeliest tokens' with theirs, in falling order."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class SequenceTokens(Message):
    """What one step brought for one sequence.

    ``offset`` is the position of the first of ``tokens``. ``logprobs`` has one entry for each of them, or none at all.
    With ``finish``, nothing comes after this; ``stop`` means that the last of ``tokens`` is the one that ended it. With
    ``failure`` nothing comes any more either, but the answer is not whole. ``cached_tokens`` is how many of the
    prompt's keys and values were there already; only the first message of an epoch says it. ``decode``: who goes on
    with the sequence after these tokens, if it is handed over; its own name takes that back.
    """

    request_id: str
    epoch: int
    offset: int = Field(ge=0)
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    failure: Failure | None = None
    cached_tokens: int = Field(default=0, ge=0)
    decode: str = ""


class TokensGenerated(Message):
    """All that one step of ``instance`` brought for sequences of one gateway: one message, not one per token.

    ``waiting`` sequences wait there for blocks; ``preemptions``: how many were made to give theirs up, since it began.
    """

    version: ClassVar[int] = 2

    instance: str
    sequences: tuple[SequenceTokens, ...]
    waiting: int = Field(default=0, ge=0)
    preemptions: int = Field(default=0, ge=0)


class CancelGeneration(Message):
    """Drop the sequence's epochs up to ``epoch``, come they before or after this; free its blocks at the next step.

    Whoever has handed one of them over passes this on.
    """

    request_id: str
    epoch: int


class FindGeneration(Message):
    """Nothing has been heard of this sequence for a while: do you still have it?"""

    request_id: str
    epoch: int


class GenerationFound(Message):
    """Whether the epoch waits or runs at the one who was asked. ``tokens``: how many of the answer's, over all epochs,
    it has sent or knows to be sent. ``decode``: to whom it was handed over; empty: to nobody, or it is forgotten."""

    request_id: str
    epoch: int
    held: bool
    tokens: int = Field(default=0, ge=0)
    decode: str = ""


# --- prefill and decode ------------------------------------------------------------------------------------------


class KVPart(Message):
    """The keys and values of ``tokens`` tokens from ``first_token`` on, in one of two forms.

    Without ``first_layer``, of all layers: ``kv`` are blocks as the model's layout has them, one tensor for each run of
    neighbours, from a block's first token on; the last block may be filled in part. With it, one tensor
    [tokens, 2, kv_heads, head_dim] for each layer from that one on. ``checksum`` is the CRC-32 over all bytes in order,
    None: not to be compared.
    """

    first_token: int = Field(ge=0)
    tokens: int = Field(ge=1)
    first_layer: int | None = Field(default=None, ge=0)
    kv: tuple[TensorRef, ...]
    checksum: int | None = Field(default=None, ge=0)


class ExpectedAnswer(Message):
    """The whole answer will have ``low`` tokens or more and fewer than ``high`` (TetriInfer, section 3.3.2).

    ``source``: who says so.
    """

    low: int = Field(ge=0)
    high: int = Field(ge=1)
    source: str


class OfferKV(Message):
    """From prefill to decode, before the first token is there: fetch these parts. Answered when they are fetched.

    The first offer of an epoch makes the receiver allocate blocks for ``kv_tokens`` tokens and the next one; where it
    has none to give, it refuses. ``number`` counts the offers before this one. What was offered is forgotten again
    after a while without a next offer or the ``TakeOver``. ``expected``: see there.
    """

    version: ClassVar[int] = 2

    request_id: str
    epoch: int
    prefill: str
    kv_tokens: int = Field(ge=1)
    block_tokens: int = Field(ge=1)
    number: int = Field(ge=0)
    parts: tuple[KVPart, ...]
    expected: ExpectedAnswer | None = None


class TakeOver(Message):
    """From prefill to decode: fetch the keys and values and go on. Answered when they are fetched.

    ``request`` has the first new token at its end, counted in ``generated``: it has been sent to the gateway, and its
    own keys and values are not computed yet. ``parts`` are, in blocks of ``block_tokens`` tokens, those of the first
    ``kv_tokens`` tokens, without what the ``offers`` before have brought. A receiver that has the first blocks already
    is offered only the rest: the parts begin at block ``first_block``. ``expected`` is what the prefill instance's
    predictor says; None: it has none.

    ``running``: it comes from another decode instance, where it can go on: whoever has no room for it now, or does not
    get its keys and values, refuses it. ``prefill`` is still who prefilled it.
    """

    version: ClassVar[int] = 4

    request: GenerateTokens
    prefill: str
    parts: tuple[KVPart, ...]
    kv_tokens: int = Field(ge=0)
    block_tokens: int = Field(ge=1)
    first_block: int = Field(default=0, ge=0)
    offers: int = Field(default=0, ge=0)
    expected: ExpectedAnswer | None = None
    running: bool = False
