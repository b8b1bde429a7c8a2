"""Prompts to train and to measure a length predictor with: of the demo language model drawn, of others read."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.messages.chat import pack_tokens
from common.models.demo_language.evaluate import SMALL_TALK, odd_ideas
from common.models.demo_language.ideas import draw_idea
from common.models.demo_language.talk import draw_talk

_TALK_SHARE = 0.25
_EXCHANGES, _EXCHANGE_SHARES = (1, 2, 3), (0.7, 0.2, 0.1)
_HELD_OUT_EVERY = 5


@dataclass(frozen=True, slots=True)
class Prompts:
    """Packed prompts: to train with, to set the temperature with, and by kind those that are only measured with."""

    training: list[bytes]
    tuning: list[bytes]
    held_out: dict[str, list[bytes]]


def demo_prompts(tokenizer: PreTrainedTokenizerFast, training: int, held_out: int, seed: int) -> Prompts:
    """For the demo language model; a tenth of ``training`` is for tuning.

    Held out are ideas whose words and templates training keeps out, talk whose letters it never has, and everything
    that was written by hand.
    """
    rng = np.random.default_rng([seed, 1])
    drawn = _distinct(tokenizer, training, False, rng)
    measured = _distinct(tokenizer, held_out, True, np.random.default_rng([seed, 2]))
    by_hand = [idea for idea, _ in odd_ideas()]
    by_hand += [case["message"] for case in json.loads(SMALL_TALK.read_text(encoding="utf-8"))]
    tuned = len(drawn) // 10
    return Prompts(
        training=drawn[tuned:],
        tuning=drawn[:tuned],
        held_out={"drawn": measured, "written by hand": [packed(tokenizer, [message]) for message in by_hand]},
    )


def prompts_in(path: Path, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """One message a line; every tenth distinct one is held out, every tenth is for tuning.

    Raises:
        OSError: it cannot be read.
        ValueError: it has fewer than 10 distinct ones.
    """
    lines = dict.fromkeys(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(lines) < 10:
        raise ValueError(f"{path}: {len(lines)} distinct prompts are too few, 10 are the least")
    prompts = [packed(tokenizer, [line]) for line in lines]
    training = [prompt for number, prompt in enumerate(prompts) if number % 10 > 1]
    return Prompts(training, prompts[1::10], {"every tenth": prompts[::10]})


def packed(tokenizer: PreTrainedTokenizerFast, said: Sequence[str]) -> bytes:
    """The tokens of a conversation, user and assistant in turns, up to where the answer begins."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return pack_tokens(asked["input_ids"])


def _distinct(tokenizer: PreTrainedTokenizerFast, count: int, held_out: bool, rng: np.random.Generator) -> list[bytes]:
    found: dict[bytes, None] = {}
    while len(found) < count:
        before = int(rng.choice(_EXCHANGES, p=_EXCHANGE_SHARES)) - 1
        said = [text for _ in range(before) for text in _exchange(False, rng)]
        found[packed(tokenizer, [*said, _exchange(held_out, rng)[0]])] = None
    return list(found)


def _exchange(held_out: bool, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() >= _TALK_SHARE:
        idea = draw_idea(rng, held_out)
        return idea.text, idea.caption
    talk = draw_talk(rng)
    while _kept_out(talk.message) != held_out:
        talk = draw_talk(rng)
    return talk.message, talk.answer


def _kept_out(message: str) -> bool:
    """By its letters alone, so that "hello" and "Hello!" are on the same side."""
    letters = "".join(letter for letter in message.lower().removesuffix(" please") if letter.isalpha())
    return zlib.crc32(letters.encode()) % _HELD_OUT_EVERY == 0
