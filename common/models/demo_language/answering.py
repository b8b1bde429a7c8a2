"""Asks the demo language model without a server: greedy answers to single messages, many at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

_MOST_NEW_TOKENS = 64
_AT_ONCE = 64


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and chat template, ready to answer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @torch.no_grad()
    def answers(self, messages: Sequence[str]) -> list[str]:
        """The greedy answer to each message, each in a conversation of its own."""
        found: list[str] = []
        for start in range(0, len(messages), _AT_ONCE):
            conversations = [[{"role": "user", "content": message}] for message in messages[start : start + _AT_ONCE]]
            asked = self.tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            tokens = self.model.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                do_sample=False,
                max_new_tokens=_MOST_NEW_TOKENS,
            )
            answered = tokens[:, asked["input_ids"].shape[1] :]
            found += self.tokenizer.batch_decode(answered, skip_special_tokens=True)
        return found


def load_language_model(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a model folder, and nothing from a network."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return LanguageModel(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))
