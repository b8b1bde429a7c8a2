"""The paper's classes made small enough for one machine (TetriInfer, section 5.1), and a predictor for them.

One factor scales whatever is counted in tokens: prompts, answers, chunks, memory, and ranges of predicted lengths. The
requests are the simulator's, all asked at once. A model with random weights answers as long as it is told to, so that
nothing in a prompt could tell how long that is. So the last token of each prompt names the range of its answer, and a
classifier of the very kind that the stack ships is trained to read it: it costs what a real one costs. As many prompts
name a wrong range as the paper's predictor does.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.messages.chat import pack_tokens
from common.models.length_predictor import LengthPredictor
from common.models.length_predictor.network import NetworkShape
from common.models.length_predictor.training import train
from common.policies.language.length_prediction import LengthBuckets
from loadgen.arrivals import generator
from loadgen.bench.process import BenchmarkError
from loadgen.bench.trace_excerpt import SmallRequest, random_tokens
from loadgen.refusal import WrongArgument
from loadgen.simulator.language.arms import VLLM_BUDGET
from loadgen.simulator.language.cost import OPT_13B_2_V100
from loadgen.simulator.language.predictors import NoisyOracle
from loadgen.simulator.language.setups import CHUNK_TOKENS
from loadgen.simulator.language.workloads import CLASSES, class_requests

TOKENS = 256  # prompts are made of ids below this, which every model knows
_PAPER_GRANULARITY, _PAPER_CLASSES = 200, 11  # of the predictor: its window of 2,048 tokens in ranges of 200
_LEAST_PROMPT, _LEAST_ANSWER = 4, 2
_WINDOW = 128
_EXAMPLES, _EPOCHS, _TESTS = 4000, 4, 300
_EXAMPLE_TOKENS = (4, 48)
_TEST_TOKENS = (4, 400)
_STREAM = 31


@dataclass(frozen=True)
class Scale:
    """``factor``: how many tokens one of the paper's becomes."""

    factor: float

    def tokens(self, of_paper: float, least: int = 1) -> int:
        """So many of the paper's, but ``least`` at least."""
        return max(least, round(of_paper * self.factor))

    @property
    def chunk_tokens(self) -> int:
        """Of a pass, where prefill is saturated in the paper."""
        return self.tokens(CHUNK_TOKENS)

    @property
    def budget_tokens(self) -> int:
        """Of a pass of the coupled baseline, which takes prompts whole."""
        return self.tokens(VLLM_BUDGET)

    @property
    def kv_tokens(self) -> int:
        """For how many an instance has room."""
        return self.tokens(OPT_13B_2_V100.kv_tokens)

    @property
    def buckets(self) -> LengthBuckets:
        """The predictor's ranges."""
        return LengthBuckets(self.tokens(_PAPER_GRANULARITY), _PAPER_CLASSES)


def requests_of(name: str, scale: Scale, seed: int, accuracy: float, count: int | None = None) -> list[SmallRequest]:
    """A class's requests, scaled; prompts end with the number of the range that is to be predicted.

    Args:
        accuracy: the share of them that names the right one; others name a near one.
        count: how many (None: as many as in the paper).
    """
    scaled = [
        replace(
            one,
            prompt_tokens=scale.tokens(one.prompt_tokens, _LEAST_PROMPT),
            answer_tokens=scale.tokens(one.answer_tokens, _LEAST_ANSWER),
        )
        for one in class_requests(CLASSES[name], seed, count)
    ]
    oracle = NoisyOracle(scale.buckets, accuracy, seed)
    oracle.prepare([one.name for one in scaled])
    found = []
    for number, one in enumerate(scaled):
        # No two prompts of any class and seed are alike.
        draw = (seed * len(CLASSES) + list(CLASSES).index(name)) << 20 | number
        said = oracle.predict(one).low // scale.buckets.granularity
        tokens = (*random_tokens(draw, one.prompt_tokens - 1, TOKENS), said)
        found.append(SmallRequest(0.0, one.name, tokens, one.answer_tokens))
    return found


def mean_lengths(requests: Sequence[SmallRequest]) -> tuple[float, float]:
    """Of prompts and answers, in tokens."""
    prompts = sum(len(one.tokens) for one in requests)
    return prompts / len(requests), sum(one.answer_tokens for one in requests) / len(requests)


def save_predictor(folder: Path, scale: Scale) -> None:
    """Train the classifier that reads a prompt's last token, and put it beside the model in ``folder``.

    Raises:
        BenchmarkError: it has not learnt to.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shape = NetworkShape(TOKENS, _WINDOW, _PAPER_CLASSES)
        with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            network = train(_examples(_EXAMPLES, _EXAMPLE_TOKENS, 1), shape, _EPOCHS, 1)
        predictor = LengthPredictor(network, scale.buckets)
        tests = _examples(_TESTS, _TEST_TOKENS, 2)
        right = sum(predictor.range(prompt).low == said * scale.buckets.granularity for prompt, said in tests)
    finally:
        torch.set_num_threads(before)
    if right < 0.99 * _TESTS:
        raise BenchmarkError(f"the predictor reads only {right} of {_TESTS} prompts")
    predictor.save(folder)


def kv_token_bytes(folder: Path, value_bytes: int) -> int:
    """Of one token's keys and values, by the model's configuration.

    Raises:
        WrongArgument: it does not say.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return int(2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width) * value_bytes
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise WrongArgument(f"{folder}: its config.json does not say how large its keys and values are") from error


def _examples(count: int, lengths: tuple[int, int], seed: int) -> list[tuple[bytes, int]]:
    """Random prompts whose last token is the number of a range, and that number."""
    chance = generator(seed, _STREAM)
    found = []
    for _ in range(count):
        tokens = chance.integers(TOKENS, size=int(chance.integers(*lengths))).tolist()
        tokens[-1] = int(chance.integers(_PAPER_CLASSES))
        found.append((pack_tokens(tokens), tokens[-1]))
    return found
