"""Trains the demo language model and its tokenizer from nothing and writes them as a model folder.

    python -m common.models.demo_language.train             # everything, on one CPU core
    python -m common.models.demo_language.train --resume    # go on after an interruption

One seed gives one model: every step draws from its own generator, and one thread calculates.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common.models.demo.loop import Budget, Stage, generator_of, run, split_parameters
from common.models.demo.optim import Average, Optimiser
from common.models.demo.parallel import Workers
from common.models.demo.precision import mixed_precision
from common.models.demo_language.batches import Batch, draw_batch, draw_conversation
from common.models.demo_language.card import Facts, write_card
from common.models.demo_language.evaluate import evaluate
from common.models.demo_language.settings import (
    AVERAGE_DECAY,
    MATRIX_LR,
    OTHER_LR,
    ROWS,
    STEPS,
    TRAINED_TOKENS,
    VOCABULARY,
    WEIGHTS,
    llama_config,
)
from common.models.demo_language.talk import TALKS
from common.models.demo_language.tokenizer import train_tokenizer, user_text

_TOKENIZER_CONVERSATIONS = 40_000
_CPU_SECONDS = "cpu_seconds.json"
_CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="model folder to write")
    parser.add_argument("--work", type=Path, default=Path("out/demo-language-training"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=20261)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the working folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = learn_tokenizer(generator_of(options.seed, 1))
    model = train(tokenizer, options.work, options.seed, options.steps, options.resume)
    cpu_s = _note_cpu_seconds(options.work / _CPU_SECONDS, options.resume)
    export(model, tokenizer, options.output)
    figures = evaluate(options.output)
    facts = Facts(seed=options.seed, steps=options.steps, cpu_minutes=cpu_s / 60)
    write_card(options.output, figures, facts, answers=len(TALKS))
    print(json.dumps(figures["shares"], indent=1), flush=True)


def _note_cpu_seconds(path: Path, resume: bool) -> float:
    """Keep this process's seconds, those noted before a resumption included, and return them all."""
    before: float = json.loads(path.read_text()) if resume and path.exists() else 0.0
    total = before + time.process_time()
    path.write_text(json.dumps(total))
    return total


def learn_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """The tokenizer of drawn conversations, both sides of them."""
    texts = (
        text
        for _ in range(_TOKENIZER_CONVERSATIONS)
        for message, answer in draw_conversation(rng)
        for text in (user_text(message), answer)
    )
    return train_tokenizer(texts, VOCABULARY, llama_config().max_position_embeddings)


def train(tokenizer: PreTrainedTokenizerFast, work: Path, seed: int, steps: int, resume: bool) -> LlamaForCausalLM:
    """Train, and return the averaged model."""
    torch.manual_seed(seed)
    # Of the attention's ways to calculate, this is the fastest one for short rows on a CPU.
    model = LlamaForCausalLM._from_config(llama_config(), attn_implementation="eager")
    workers = Workers()
    matrices, others = split_parameters(model, keep_out=("embed_tokens",))

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        return answer_loss(model, draw_batch(tokenizer, ROWS, TRAINED_TOKENS, rng))

    stage = Stage(
        name="language",
        budget=Budget(steps=steps, seconds=math.inf),
        module=model,
        optimiser=Optimiser(matrices, others, MATRIX_LR, OTHER_LR, workers),
        average=Average(model, AVERAGE_DECAY),
        loss_of=loss_of,
        seed=seed + 2,
        workers=workers,
    )
    run(stage, work, resume)
    return model


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each predicted from those before it."""
    with mixed_precision(_CPU):
        hidden = model.model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).last_hidden_state
        wanted = batch.answers[:, 1:]
        logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.tokens[:, 1:][wanted])


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder as transformers reads it: bfloat16 weights, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # In tokenizer_config.json the template is read by old and new versions alike.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


if __name__ == "__main__":
    main()
