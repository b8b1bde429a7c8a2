"""A trace of production made small enough for one machine, with its prompts' common beginnings as they were.

Whole conversations are drawn, until there are as many requests as asked for. A block of 512 tokens becomes one of 16,
of token ids that follow from its id; times are shortened all alike, answers as blocks are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.mempool.address import BLOCK_TOKENS, KEY_BYTES
from loadgen.arrivals import generator
from loadgen.simulator.memserve import trace
from loadgen.simulator.memserve.turns import Turn

_SCALE = trace.BLOCK_TOKENS // BLOCK_TOKENS
# Apart from block ids, which seed the tokens of blocks.
_REST = 1 << 40
_CHOICE = 7


@dataclass(frozen=True)
class SmallRequest:
    """``due_s``: when it is asked, if the one before it of its conversation has been answered by then."""

    due_s: float
    conversation: str
    tokens: tuple[int, ...]
    answer_tokens: int


def excerpt(turns: Sequence[Turn], requests: int, rate: float, seed: int, vocabulary: int) -> list[SmallRequest]:
    """About ``requests`` requests, ``rate`` a second on average, in the order of their times from 0 on.

    Args:
        seed: of the conversations that are drawn.
        vocabulary: of how many tokens prompts are made.
    """
    conversations = sorted({turn.conversation for turn in turns})
    generator(seed, _CHOICE).shuffle(conversations)
    sizes: dict[str, int] = {}
    for turn in turns:
        sizes[turn.conversation] = sizes.get(turn.conversation, 0) + 1
    drawn, count = set(), 0
    for conversation in conversations:
        if count >= requests:
            break
        drawn.add(conversation)
        count += sizes[conversation]
    found = [(place, turn) for place, turn in enumerate(turns) if turn.conversation in drawn]
    first_s, last_s = found[0][1].arrival_s, found[-1][1].arrival_s
    shorter = len(found) / rate / (last_s - first_s) if last_s > first_s else 0.0
    return [
        SmallRequest(
            (turn.arrival_s - first_s) * shorter,
            turn.conversation,
            _tokens(turn, place, vocabulary),
            math.ceil(turn.answer_tokens / _SCALE),
        )
        for place, turn in found
    ]


def _tokens(turn: Turn, place: int, vocabulary: int) -> tuple[int, ...]:
    """The prompt's whole blocks, and what is left beyond them, which no other prompt has."""
    ids = [
        int.from_bytes(turn.tokens[start : start + KEY_BYTES], "little")
        for start in range(0, len(turn.tokens), KEY_BYTES)
    ]
    tokens = [token for block in ids for token in random_tokens(block, BLOCK_TOKENS, vocabulary)]
    rest = max(1, turn.prompt_tokens % trace.BLOCK_TOKENS // _SCALE)
    return (*tokens, *random_tokens(_REST + place, rest, vocabulary))


def random_tokens(seed: int, count: int, vocabulary: int) -> list[int]:
    """Always the same of one seed."""
    found: list[int] = np.random.default_rng(seed).integers(vocabulary, size=count).tolist()
    return found
