"""Training batches: conversations of one to three exchanges, packed into rows; each attends to itself alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.models.demo_language.ideas import draw_idea
from common.models.demo_language.talk import draw_talk
from common.models.demo_language.tokenizer import ASSISTANT, END, SPECIAL_TOKENS, USER, user_text

_TALK_SHARE = 0.08
_EXCHANGE_COUNTS = (1, 2, 3)
_EXCHANGE_SHARES = (0.7, 0.2, 0.1)
_NO_CONVERSATION = -1
_UNSEEN = np.float32(-1e9)

_END, _ASSISTANT = SPECIAL_TOKENS.index(END), SPECIAL_TOKENS.index(ASSISTANT)


@dataclass(frozen=True)
class Batch:
    """tokens: int64 [B, T]; answers: bool [B, T], true where a token belongs to an answer and is to be predicted;
    attention: float32 [B, 1, T, T], to be added to the scores: 0 where the row's token may see the column's."""

    tokens: Tensor
    answers: Tensor
    attention: Tensor


def draw_conversation(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(message, answer) pairs of one to three exchanges that have nothing to do with each other."""
    count = int(rng.choice(_EXCHANGE_COUNTS, p=_EXCHANGE_SHARES))
    return [_draw_exchange(rng) for _ in range(count)]


def _draw_exchange(rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < _TALK_SHARE:
        talk = draw_talk(rng)
        return talk.message, talk.answer
    idea = draw_idea(rng)
    return idea.text, idea.caption


def encode(tokenizer: PreTrainedTokenizerFast, conversation: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """(token ids as the chat template gives them, whether each belongs to an answer or ends one)."""
    text = "".join(f"{USER}{user_text(message)}{ASSISTANT}{answer}{END}" for message, answer in conversation)
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    answers, answering = [], False
    for token in ids:
        answers.append(answering)
        answering = token == _ASSISTANT or (answering and token != _END)
    return ids, answers


def draw_batch(tokenizer: PreTrainedTokenizerFast, rows: int, tokens: int, rng: np.random.Generator) -> Batch:
    """Fill `rows` rows of `tokens` tokens with conversations until one finds no room."""
    ids = np.zeros((rows, tokens), dtype=np.int64)
    answers = np.zeros((rows, tokens), dtype=bool)
    owners = np.full((rows, tokens), _NO_CONVERSATION, dtype=np.int64)
    used = [0] * rows
    number = 0
    while True:
        conversation, is_answer = encode(tokenizer, draw_conversation(rng))
        length = len(conversation)
        if length > tokens:
            continue
        row = next((row for row in range(rows) if used[row] + length <= tokens), None)
        if row is None:
            break
        place = slice(used[row], used[row] + length)
        ids[row, place], answers[row, place], owners[row, place] = conversation, is_answer, number
        used[row] += length
        number += 1
    together = owners[:, None, :, None] == owners[:, None, None, :]
    before = np.tril(np.ones((tokens, tokens), dtype=bool))
    attention = np.where(together & before, np.float32(0), _UNSEEN)
    return Batch(*(torch.from_numpy(values) for values in (ids, answers, attention)))
