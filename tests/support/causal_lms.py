"""Small causal language models with random weights, made on the spot, and what transformers says of them."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from common.models.causal_lm import CausalLM

VOCABULARY = 97
CONTEXT = 256
WINDOW = 20

# Class names' beginning, and what its configuration has beside what all have.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW}),
}


@cache
def small_model(family: str) -> PreTrainedModel:
    """Two layers with weights large enough that every part of the formula shows in the logits. Not to be changed."""
    name, special = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def causal_lm(family: str, fuse: bool = True, native: bool = True) -> CausalLM:
    """Ours, with the same weights."""
    return CausalLM(copy.deepcopy(small_model(family)), fuse, native)


@dataclass(frozen=True)
class Expected:
    """What transformers answers greedily to one prompt.

    Attributes:
        tokens: of the answer.
        logprobs: of each of them.
        margins: by how much each one's logit is above the next best.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


@cache
def expected(family: str, prompt: tuple[int, ...], count: int) -> Expected:
    model = small_model(family)
    ids = torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    logits = all_logits(family, tuple(whole[0].tolist()))[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)[torch.arange(count), tokens]
    best = logits.topk(2).values
    return Expected(tuple(tokens), tuple(logprobs.tolist()), tuple((best[:, 0] - best[:, 1]).tolist()))


@cache
def all_logits(family: str, tokens: tuple[int, ...]) -> Tensor:
    """[tokens, vocabulary], after each of them, from one forward pass of transformers' own."""
    with torch.inference_mode():
        logits: Tensor = small_model(family)(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
