"""Trains a main model's length predictor from that model's own answers, measures it, and puts it in the model's folder.

    python -m common.models.length_predictor.train                                    # of the demo language model
    python -m common.models.length_predictor.train --model FOLDER --prompts LINES.txt --granularity 100 --buckets 20

The demo language model's prompts are drawn; another's are read, one message a line. One thread calculates.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from common.models.causal_lm import load_tokenizer
from common.models.demo_language.settings import NAME as DEMO_NAME
from common.models.demo_language.settings import WEIGHTS as DEMO_WEIGHTS
from common.models.length_predictor.answers import Answered, Answering
from common.models.length_predictor.card import Facts, write_card
from common.models.length_predictor.measure import counted, measure
from common.models.length_predictor.network import NetworkShape
from common.models.length_predictor.predictor import LengthPredictor
from common.models.length_predictor.prompts import Prompts, demo_prompts, prompts_in
from common.models.length_predictor.training import Example, best_temperature, train
from common.policies.language.length_prediction import LengthBuckets

_MOST_ROWS = 4096
_WINDOW = 128
_TEMPERATURES = (0.0, 1.0)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    answering = Answering(options.model)
    prompts = _prompts(options)
    buckets = LengthBuckets(options.granularity, options.buckets)
    started_s = time.process_time()
    learnt, tuned, *rest = (
        answering.answer(some, _TEMPERATURES, options.most_tokens, seed=options.seed + part * 10_000_000)
        for part, some in enumerate((prompts.training, prompts.tuning, *prompts.held_out.values()))
    )
    answered_s = time.process_time()
    print(f"{len(learnt) + len(tuned)} answers in {answered_s - started_s:.0f} s", flush=True)
    shape = NetworkShape(min(answering.vocabulary, _MOST_ROWS), _WINDOW, buckets.buckets)
    network = train(_examples(learnt, buckets), shape, options.epochs, options.seed)
    LengthPredictor(network, buckets, best_temperature(network, _examples(tuned, buckets))).save(options.model)
    trained_s = time.process_time()
    # As everybody else will have it: from its file, in half precision.
    predictor = LengthPredictor.load(options.model)
    figures = measure(predictor, counted(learnt, buckets), dict(zip(prompts.held_out, rest, strict=True)))
    facts = Facts(
        model=DEMO_NAME if options.model == DEMO_WEIGHTS else options.model.resolve().name,
        seed=options.seed,
        training=len(prompts.training),
        tuning=len(prompts.tuning),
        answers=len(learnt) + len(tuned) + sum(map(len, rest)),
        most_tokens=options.most_tokens,
        epochs=options.epochs,
        answer_s=answered_s - started_s,
        train_s=trained_s - answered_s,
    )
    write_card(options.model, predictor, figures, facts)
    print(json.dumps(figures, indent=1), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_WEIGHTS, help="the main model's folder (default: the demo)")
    parser.add_argument("--prompts", type=Path, help="a file of messages, one a line; without it: the demo's, drawn")
    parser.add_argument("--count", type=int, default=30_000, help="how many prompts to draw for training")
    parser.add_argument("--held-out", type=int, default=2_000, help="how many to draw for measuring")
    parser.add_argument("--granularity", type=int, default=2, help="tokens in a range")
    parser.add_argument("--buckets", type=int, default=14, help="how many ranges; the last one is open")
    parser.add_argument("--most-tokens", type=int, default=64, help="answers are cut here")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=20262)
    options = parser.parse_args()
    if options.prompts is None and options.model.resolve() != DEMO_WEIGHTS.resolve():
        parser.error("--prompts is needed for any model but the demo language model")
    return options


def _prompts(options: argparse.Namespace) -> Prompts:
    tokenizer = load_tokenizer(options.model)
    if options.prompts is not None:
        return prompts_in(options.prompts, tokenizer)
    return demo_prompts(tokenizer, options.count, options.held_out, options.seed)


def _examples(answers: Sequence[Answered], buckets: LengthBuckets) -> list[Example]:
    return [(one.prompt, buckets.bucket(one.tokens)) for one in answers]


if __name__ == "__main__":
    main()
