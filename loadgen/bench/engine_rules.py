"""Orders of prompts, rules of admission and batches in a real engine, without a network (TetriInfer, section 5.2).

Everything is there at once, as in the paper: prompts alone, by order (figure 16); whole answers in a pool that is too
small for all, by rule of admission (figure 18); and in one that is not, by kind of batch. Lengths are those of the
simulator's workloads, the model has random weights, answers end where they are to. The arms take turns, round by round.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.engine import Engine, Request
from common.messages.chat import pack_tokens
from common.models.causal_lm import BLOCK_TOKENS, CausalLM, KVPool, load
from common.models.causal_lm.sampling import SamplingParameters
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission
from common.policies.language.length_prediction import LengthBuckets
from common.policies.language.prefill_schedule import PrefillOrder
from loadgen.bench.rounds import spread
from loadgen.counts import count, not_negative
from loadgen.random_language_model import VOCABULARY, save_random_language_model
from loadgen.simulator.language.predictors import PAPER_ACCURACY, NoisyOracle, Oracle, Predictor
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.workloads import MIXED, SHAREGPT, class_requests
from loadgen.simulator.outcome import summary

_CHUNK_TOKENS = 512
_GRANULARITY = 200
_BUCKETS = LengthBuckets(_GRANULARITY, 11)
# Of the tokens of all 256 sequences of the paper's test, two V100s hold so many.
_POOL_SHARE = 0.23


@dataclass(frozen=True)
class Arm:
    """What is compared. ``predictor``: who says, of a round's seed and requests, how long answers will be."""

    name: str
    rules: BatchingRules
    most_sequences: int = 256
    predictor: Callable[[int, Sequence[ChatRequest]], Predictor] | None = None


@dataclass(frozen=True)
class Part:
    """Arms that are measured on the same requests, the first the one that the others are held to.

    ``measure``: by what. ``pool_share``: the pool's size, of what all requests come to.
    """

    title: str
    arms: tuple[Arm, ...]
    requests: Callable[[int, int], list[ChatRequest]]
    measure: str
    pool_share: float = 1.0


@dataclass(frozen=True)
class Reading:
    """One run; seconds after its begin, of every request in its order. ``preempted``: how often any was."""

    ttft_s: tuple[float, ...]
    jct_s: tuple[float, ...]
    preempted: int

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.ttft_s if measure == "ttft_s" else self.jct_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=count, default=3, help="of each arm (default %(default)s)")
    parser.add_argument("--requests", type=count, default=96, help="of each run (default %(default)s)")
    parser.add_argument("--seed", type=not_negative, default=1, help="of the first round (default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print, and return what ``--json`` writes."""
    with tempfile.TemporaryDirectory(prefix="triptych-rules-") as folder:
        model = load(save_random_language_model(Path(folder)), "cpu")
    runs: list[dict[str, object]] = []
    for name in options.part or PARTS:
        part = PARTS[name]
        readings = measured(model, part, options.rounds, options.requests, options.seed)
        print("\n".join(told(part, readings, options.requests)))
        for arm, rounds in readings.items():
            runs += [_run(name, arm, options.seed + number, one) for number, one in enumerate(rounds)]
    return {"environment": {"chunk_tokens": _CHUNK_TOKENS, "granularity": _GRANULARITY}, "runs": runs}


def measured(model: CausalLM, part: Part, rounds: int, count: int, seed: int) -> dict[str, list[Reading]]:
    """Every arm's readings. A round's requests are the same for all; who begins changes from round to round."""
    readings: dict[str, list[Reading]] = {arm.name: [] for arm in part.arms}
    one_run(model, part, part.arms[0], part.requests(seed, min(count, 8)), seed)  # not counted: memory is touched
    for number in range(rounds):
        requests = part.requests(seed + number, count)
        first = number % len(part.arms)
        for arm in (*part.arms[first:], *part.arms[:first]):
            readings[arm.name].append(one_run(model, part, arm, requests, seed + number))
    return readings


def one_run(model: CausalLM, part: Part, arm: Arm, requests: Sequence[ChatRequest], seed: int) -> Reading:
    """All at once, until all are at their end."""
    lengths = [one.prompt_tokens + one.answer_tokens for one in requests]
    blocks = max(max(lengths) // BLOCK_TOKENS + 1, int(part.pool_share * sum(lengths)) // BLOCK_TOKENS + len(requests))
    engine = Engine(model, KVPool(model.layout, blocks), None, _CHUNK_TOKENS, arm.most_sequences, rules=arm.rules)
    predictor = arm.predictor(seed, requests) if arm.predictor is not None else None
    chance = random.Random(seed)
    for one in requests:
        prompt = pack_tokens(chance.randrange(VOCABULARY) for _ in range(one.prompt_tokens))
        expected = one.prompt_tokens + predictor.predict(one).low if predictor is not None else 0
        sampling = SamplingParameters(temperature=0)
        engine.add(one.name, Request(prompt, one.answer_tokens, sampling, ignore_end=True), 0.0, expected)
    first: dict[str, float] = {}
    end: dict[str, float] = {}
    began_s = time.perf_counter()
    while engine.busy:
        outputs = engine.step(time.perf_counter() - began_s)
        now_s = time.perf_counter() - began_s
        for output in outputs:
            first.setdefault(output.sequence, now_s)
            end[output.sequence] = now_s
    names = [one.name for one in requests]
    return Reading(tuple(first[name] for name in names), tuple(end[name] for name in names), engine.counts.preempted)


def told(part: Part, readings: dict[str, list[Reading]], count: int) -> list[str]:
    """A table for people."""
    base = readings[part.arms[0].name]
    what = "first" if part.measure == "ttft_s" else "last"
    lines = [f"{part.title}: {count} requests at once, {len(base)} rounds; mean time to the {what} token, ratio"]
    for name, rounds in readings.items():
        means = [one.mean(part.measure) for one in rounds]
        ratio = spread([mine / other.mean(part.measure) for mine, other in zip(means, base, strict=True)])
        last_s = statistics.median(max(one.jct_s) for one in rounds)
        preempted = statistics.median(one.preempted for one in rounds)
        numbers = f"{statistics.median(means):7.2f} s  {ratio.text}  all done {last_s:6.2f} s"
        lines.append(f"  {name:<26}{numbers}  {preempted:5.0f} preempted")
    return lines


def _run(part: str, arm: str, seed: int, reading: Reading) -> dict[str, object]:
    count = len(reading.jct_s)
    return {
        "part": part,
        "policy": arm,
        "rate": 0.0,
        "seed": seed,
        "requests": count,
        "completed": count,
        "preempted": reading.preempted,
        "ttft_s": summary(np.asarray(reading.ttft_s)),
        "jct_s": summary(np.asarray(reading.jct_s)),
    }


def _prompts(seed: int, count: int) -> list[ChatRequest]:
    return [ChatRequest(one.name, 0.0, one.prompt_tokens, 1) for one in class_requests(MIXED, seed, count)]


def _ordered(order: PrefillOrder, batch: int = 16) -> Arm:
    name = f"{order.value}-{batch}" if order in (PrefillOrder.SJF, PrefillOrder.LJF) else order.value
    return Arm(name, BatchingRules(order=order, batch=batch))


def _oracle(_: int, requests: Sequence[ChatRequest]) -> Predictor:
    return Oracle(_BUCKETS)


def _noisy(seed: int, requests: Sequence[ChatRequest]) -> Predictor:
    predictor = NoisyOracle(_BUCKETS, PAPER_ACCURACY[_GRANULARITY], seed)
    predictor.prepare([one.name for one in requests])
    return predictor


def _admitting() -> tuple[Arm, ...]:
    reserving = (AdmissionRule.RESERVE_STATIC, AdmissionRule.RESERVE_DYNAMIC)
    accuracies = (("buckets known", _oracle), (f"{PAPER_ACCURACY[_GRANULARITY]:.1%} right", _noisy))
    arms = [
        Arm(f"{rule.value.removeprefix('reserve_')}, {name}", BatchingRules(admission=DecodeAdmission(rule)), 256, by)
        for (name, by), rule in itertools.product(accuracies, reserving)
    ]
    return Arm("greedy", BatchingRules()), *arms


PARTS = {
    "order": Part(
        "Prompts",
        (
            *(_ordered(order) for order in (PrefillOrder.FCFS, PrefillOrder.SJF, PrefillOrder.LJF)),
            _ordered(PrefillOrder.SJF, 128),
            _ordered(PrefillOrder.SRF),
        ),
        _prompts,
        "ttft_s",
    ),
    "admission": Part(
        f"Answers in {_POOL_SHARE:.0%} of the memory that all take",
        _admitting(),
        lambda seed, count: class_requests(SHAREGPT, seed, count),
        "jct_s",
        _POOL_SHARE,
    ),
    "batches": Part(
        "Answers in batches",
        (
            Arm("continuous", BatchingRules()),
            Arm("continuous, 16 at most", BatchingRules(), 16),
            Arm("fixed, of 16", BatchingRules(fixed=True), 16),
        ),
        lambda seed, count: class_requests(MIXED, seed, count),
        "jct_s",
    ),
}
