"""Prompts to what the transformer reads: a T5 encoder (arXiv 1910.10683) and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from common.models.opensora.errors import ModelLoadError, PromptTooLongError


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts. embeddings: float32 [B, 1, L, C]; mask: int64 [B, L], 1 for a token, 0 for padding."""

    embeddings: Tensor
    mask: Tensor

    def row(self, index: int) -> "TextEmbedding":
        """One prompt of the batch."""
        return TextEmbedding(self.embeddings[index : index + 1], self.mask[index : index + 1])

    def to(self, device: str | torch.device) -> "TextEmbedding":
        return TextEmbedding(self.embeddings.to(device), self.mask.to(device))


def clean_prompt(prompt: str) -> str:
    """The prompt as the model was trained on prompts: lower case, single spaces."""
    return " ".join(prompt.lower().split())


class TextEncoder:
    """The encoder half of a T5 in a folder or hub repository. Every prompt is padded to `max_length` tokens."""

    def __init__(
        self,
        location: str | Path,
        max_length: int,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load it. Raises ModelLoadError."""
        self.max_length = max_length
        self.device = torch.device(device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(location)
            self._model = T5EncoderModel.from_pretrained(location, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{location}: no readable T5 encoder with tokenizer there ({error})") from error

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt, the end mark included."""
        return len(self._tokenizer(clean_prompt(prompt))["input_ids"])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbedding:
        """Encode a batch. Raises PromptTooLongError for a prompt of more than `max_length` tokens."""
        if not prompts:
            raise ValueError("no prompts to encode")
        texts = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenizer(texts, padding="max_length", max_length=self.max_length, return_attention_mask=True)
        longest = max(len(ids) for ids in tokens["input_ids"])
        if longest > self.max_length:
            raise PromptTooLongError(longest, self.max_length)
        ids = torch.tensor(tokens["input_ids"], device=self.device)
        mask = torch.tensor(tokens["attention_mask"], device=self.device)
        states: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return TextEmbedding(states.float()[:, None], mask)
