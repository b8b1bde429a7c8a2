"""Prompts to what the transformer reads: a T5 encoder (arXiv 1910.10683) and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from common.models.opensora.errors import ModelLoadError, PromptTooLongError


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts. embeddings: float32 [B, 1, L, C]; mask: int64 [B, L], 1 for a token, 0 for padding."""

    embeddings: Tensor
    mask: Tensor


def clean_prompt(prompt: str) -> str:
    """The prompt as the model was trained on prompts: lower case, single spaces."""
    return " ".join(prompt.lower().split())


class TextEncoder:
    """The encoder half of a T5, and its tokenizer, from a folder or hub repository.

    max_batch: how many prompts go through the model at once, where batching pays.
    """

    max_batch = 4

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

    def encode(self, prompts: list[str]) -> TextEmbedding:
        """Encode a batch, padded as published. Raises PromptTooLongError for more than `max_length` tokens."""
        return self._encode(prompts, padding="max_length")

    def encode_each(self, prompts: list[str]) -> list[Tensor]:
        """Encode prompts to float32 [tokens, C] each, without padding. Raises PromptTooLongError.

        A prompt's bits do not depend on its company, as matrix kernels sum in another order for another shape: on a
        CPU, where a batch gains nothing, each prompt is encoded by itself; elsewhere all batches have one shape.
        """
        alone = self.device.type == "cpu"
        rows = 1 if alone else self.max_batch
        encoded: list[Tensor] = []
        for start in range(0, len(prompts), rows):
            batch = prompts[start : start + rows]
            filled = batch + [""] * (rows - len(batch))
            embedding = self._encode(filled, padding="longest" if alone else "max_length")
            counts = embedding.mask.sum(1).tolist()[: len(batch)]
            encoded += [embedding.embeddings[row, 0, :count].contiguous() for row, count in enumerate(counts)]
        return encoded

    @torch.no_grad()
    def _encode(self, prompts: list[str], padding: Literal["max_length", "longest"]) -> TextEmbedding:
        if not prompts:
            raise ValueError("no prompts to encode")
        texts = [clean_prompt(prompt) for prompt in prompts]
        length = self.max_length if padding == "max_length" else None
        tokens = self._tokenizer(texts, padding=padding, max_length=length, return_attention_mask=True)
        longest = max(sum(mask) for mask in tokens["attention_mask"])
        if longest > self.max_length:
            raise PromptTooLongError(longest, self.max_length)
        ids = torch.tensor(tokens["input_ids"], device=self.device)
        mask = torch.tensor(tokens["attention_mask"], device=self.device)
        states: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return TextEmbedding(states.float()[:, None], mask)
