"""A small random language model with the tiny tokenizer, as files, and what transformers answers with it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.support.language import END_ID
from tests.support.tiny_tokenizer import tiny_tokenizer, write_tokenizer

CONTEXT = 512
# Of one block of its keys and values.
BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4


def write_language_model(folder: Path) -> Path:
    """Two layers whose weights are large enough that the next token is seldom a matter of rounding."""
    write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=tiny_tokenizer().get_vocab_size(with_added_tokens=True),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        pad_token_id=END_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Answer:
    """``margin``: by how much the logit of each token is above the next best, at least."""

    tokens: list[int]
    margin: float


@cache
def _theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@cache
def greedy(folder: Path, prompt: tuple[int, ...], count: int) -> Answer:
    """What transformers' ``generate`` answers, at most ``count`` tokens."""
    model = _theirs(folder)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.cat(whole.logits).topk(2).values
    return Answer(whole.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min()))
