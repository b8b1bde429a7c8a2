"""Roles that flip against fixed splits on the live stack, under a workload that turns from prompts to answers and back.

Every split of the instances into those that prefill and those that decode, and one stack that begins with a single one
that decodes and whose roles flip by demand (TetriInfer, section 3.5). All run at once, each idle but for its
turn; a round's requests are the same for all, and every other round turns the other way, so that the stack that flips
begins each but the first as it ended the one before. A JCT runs from the time at which a request is due to its last
token. Rates are a share of what one instance was measured to do alone, times the cores that a role can use at most.
"""

import argparse
import asyncio
import contextlib
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loadgen.bench.answering import answering
from loadgen.bench.flip_workload import Kind, turning
from loadgen.bench.language_stack import LanguageStack, stack_of
from loadgen.bench.phases_workload import kv_token_bytes
from loadgen.bench.process import BenchmarkError, located_folder
from loadgen.bench.rounds import MEASURES, Readings, comparison
from loadgen.bench.trace_excerpt import SmallRequest, random_tokens
from loadgen.counts import count, not_negative, width
from loadgen.environment import this_machine
from loadgen.random_language_model import VOCABULARY, save_random_language_model
from loadgen.refusal import WrongArgument
from loadgen.simulator.outcome import summary

FLIPPING = "flipping"
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}
_BLOCK_TOKENS = 16
_SETTINGS = ("instances", "seconds", "load", "cost", "prompts", "answers", "room")
_CALIBRATION_SEED = 1 << 40
_FLIPS = "triptych_role_flip_seconds"


@dataclass(frozen=True)
class Flips:
    """How many there were, and how long they took, without draining."""

    count: int
    seconds: float
    under_10_ms: int

    def __sub__(self, before: "Flips") -> "Flips":
        return Flips(self.count - before.count, self.seconds - before.seconds, self.under_10_ms - before.under_10_ms)

    @property
    def text(self) -> str:
        if not self.count:
            return "no flips"
        return f"{self.count} flips of {1000 * self.seconds / self.count:.1f} ms, {self.under_10_ms} below 10 ms"


def flips_in(metrics: str) -> Flips:
    """What the stack's metrics say, in Prometheus' text."""

    def added(pattern: str) -> float:
        return sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE))

    return Flips(
        round(added(rf"^{_FLIPS}_count\S* (\S+)$")),
        added(rf"^{_FLIPS}_sum\S* (\S+)$"),
        round(added(rf'^{_FLIPS}_bucket{{le="0.01",\S* (\S+)$')),
    )


def splits(instances: int) -> dict[str, tuple[int, int]]:
    """How many may prefill and how many decode, by the paper's way to write it."""
    return {f"{more}P{instances - more}D": (more, instances - more) for more in range(instances - 1, 0, -1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--instances", type=int, default=3, metavar="N", help="of each stack (default %(default)s)")
    parser.add_argument("--splits", nargs="*", metavar="NAME", help="to compare with, like 2P1D (default: all)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first-seed", type=not_negative, default=0, metavar="N", help="of the first round")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each half of a round (default %(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="share of what the cores can do (default %(default)s)")
    parser.add_argument("--cost", type=float, default=0.5, help="TRIPTYCH_FLIP_COST_S (default %(default)s)")
    parser.add_argument("--prompts", type=int, nargs=2, default=(384, 8), metavar="N", help="tokens in and out")
    parser.add_argument("--answers", type=int, nargs=2, default=(24, 96), metavar="N", help="tokens in and out")
    parser.add_argument("--room", type=int, default=6, metavar="N", help="answers that an instance has room for")
    parser.add_argument("--model", metavar="FOLDER", help="a published model (default: one with random weights)")
    parser.add_argument("--hidden", type=width, default=512, metavar="N", help="channels of the random model")
    parser.add_argument("--layers", type=count, default=8, metavar="N", help="(default %(default)s)")
    parser.add_argument("--precision", choices=tuple(_VALUE_BYTES), default="bfloat16", help="(default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run the rounds, print, and return what ``--json`` writes."""
    if min(options.rounds, options.room, *options.prompts, *options.answers) < 1 or not all(
        0 < value < math.inf for value in (options.seconds, options.load, options.cost)
    ):
        raise WrongArgument("rounds, tokens and room are 1 or more, seconds, load and cost above 0")
    if options.instances < 2:
        raise WrongArgument(f"--instances {options.instances}: give 2 or more, one for each role")
    known = splits(options.instances)
    for name in options.splits or ():
        if name not in known:
            raise WrongArgument(f"--splits {name}: there are {', '.join(known)}")
    with TemporaryDirectory(prefix="flip-") as folder, answering("a stack"):
        if options.model is not None:
            model = located_folder(options.model, "--model")
        else:
            model = save_random_language_model(Path(folder) / "random", options.hidden, options.layers)
        return asyncio.run(_run(options, model))


async def _run(options: argparse.Namespace, model: Path) -> dict[str, object]:
    prompts, answers = Kind(*options.prompts), Kind(*options.answers)
    async with contextlib.AsyncExitStack() as exits:
        stacks = {}
        for name in (*(splits(options.instances) if options.splits is None else options.splits), FLIPPING):
            stacks[name] = await exits.enter_async_context(_stack(options, model, name, prompts, answers))
            await stacks[name].warm_up(options.instances)
        rates = await _rates(options, stacks[FLIPPING], prompts, answers)
        print(_head(options, rates), flush=True)
        readings = Readings({name: [] for name in stacks})
        flips: list[Flips] = []
        for number in range(options.rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            kinds = [(prompts, answers)[place] for place in order]
            seed = options.first_seed + number
            requests = turning(kinds, [rates[place] for place in order], options.seconds, seed, VOCABULARY)
            latencies = await _round(stacks, number, requests, options.seconds, flips)
            readings = readings.with_round(latencies)
    print("\n".join(_lines(readings)))
    return _result(options, rates, readings, flips)


def _stack(
    options: argparse.Namespace, model: Path, name: str, prompts: Kind, answers: Kind
) -> contextlib.AbstractAsyncContextManager[LanguageStack]:
    """One stack; the one that flips begins with a single instance that decodes."""
    prefill, decode = splits(options.instances).get(name, (options.instances - 1, 1))
    tokens = max(options.room * answers.most_tokens, prompts.most_tokens) + 2 * _BLOCK_TOKENS
    settings = {
        "TRIPTYCH_ROLE": "decode",
        "TRIPTYCH_PRECISION": options.precision,
        "TRIPTYCH_KV_BYTES": str(tokens * kv_token_bytes(model, _VALUE_BYTES[options.precision])),
        "TRIPTYCH_CHUNK_TOKENS": "128",
        "TRIPTYCH_LENGTH_PREDICTION": "off",
        "TRIPTYCH_FLIP": "queue" if name == FLIPPING else "off",
        "TRIPTYCH_FLIP_COST_S": str(options.cost),
    }
    return stack_of(str(model), {"dit": 1, "vae": 1, "prefill": prefill, "decode": decode}, settings, VOCABULARY)


async def _rates(
    options: argparse.Namespace, stack: LanguageStack, prompts: Kind, answers: Kind
) -> tuple[float, float]:
    """Requests a second of either kind, by what one instance does alone."""
    cores = min(os.cpu_count() or 1, max(1, options.instances - 1))

    async def seconds(kind: Kind, at_once: int, number: int) -> float:
        asked = [
            SmallRequest(
                0.0,
                f"calibration {number}-{place}",
                tuple(random_tokens(_CALIBRATION_SEED + 1000 * number + place, kind.prompt_tokens, VOCABULARY)),
                kind.answer_tokens,
            )
            for place in range(at_once)
        ]
        found = await asyncio.gather(*map(stack.ask, asked))
        return max(answer.jct_s for answer in found)

    alone_s = min([await seconds(prompts, 1, number) for number in range(3)])
    full_s = min([await seconds(answers, options.room, number) for number in (3, 4)])
    return options.load * cores / alone_s, options.load * cores * options.room / full_s


async def _round(
    stacks: Mapping[str, LanguageStack],
    number: int,
    requests: Sequence[SmallRequest],
    seconds: float,
    flips: list[Flips],
) -> dict[str, list[float]]:
    """The requests once on every stack; who begins changes from round to round."""
    names = list(stacks)
    first = number % len(names)
    latencies = {}
    for name in (*names[first:], *names[:first]):
        before = await _flips(stacks[name])
        latencies[name] = await _replay(stacks[name], requests)
        done = await _flips(stacks[name]) - before
        halves = [
            np.mean([jct for jct, one in zip(latencies[name], requests, strict=True) if (one.due_s >= seconds) == half])
            for half in (False, True)
        ]
        said = f"mean JCT {np.mean(latencies[name]):.2f} s; halves {halves[0]:.2f} s, {halves[1]:.2f} s"
        if name == FLIPPING:
            flips.append(done)
            said += f"; {done.text}"
        print(f"  round {number + 1}, {len(requests)} requests, {name}: {said}", flush=True)
    return latencies


async def _replay(stack: LanguageStack, requests: Sequence[SmallRequest]) -> list[float]:
    """Ask for each at its time, whatever became of the others; seconds from that time to its last token."""
    # A little later, so that the first one is not late already.
    begin_s = time.monotonic() + 0.2

    async def one(request: SmallRequest) -> float:
        await asyncio.sleep(max(0.0, begin_s + request.due_s - time.monotonic()))
        answer = await stack.ask(request)
        if answer.answer_tokens != request.answer_tokens:
            raise BenchmarkError(f"an answer has {answer.answer_tokens} tokens instead of {request.answer_tokens}")
        return answer.asked_s + answer.jct_s - begin_s - request.due_s

    return list(await asyncio.gather(*map(one, requests)))


async def _flips(stack: LanguageStack) -> Flips:
    return flips_in(await stack.metrics())


def _head(options: argparse.Namespace, rates: Sequence[float]) -> str:
    cores = os.cpu_count()
    return (
        f"{options.seconds:g} s of {rates[0]:.1f} requests a second with {options.prompts[0]} tokens in and "
        f"{options.prompts[1]} out, {options.seconds:g} s of {rates[1]:.1f} with {options.answers[0]} and "
        f"{options.answers[1]}, then the other way round; {options.instances} instances of one thread on {cores} "
        f"cores, each with room for {options.room} answers"
    )


def _lines(readings: Readings) -> list[str]:
    """Each stack's measures, and ours over each of the others."""
    found = []
    for name in readings.rounds:
        whole = readings.pooled(name)
        found.append(f"{name:<8}  JCT mean {whole['mean']:6.2f} s  p99 {whole['p99']:6.2f} s")
    for name in readings.rounds:
        if name != FLIPPING:
            ratios = {measure: readings.ratio(FLIPPING, name, measure) for measure in MEASURES}
            said = ", ".join(f"{measure} {ratio.text} {ratio.verdict}" for measure, ratio in ratios.items())
            found.append(f"{FLIPPING} over {name}: {said}")
    return found


def _result(
    options: argparse.Namespace, rates: Sequence[float], readings: Readings, flips: Sequence[Flips]
) -> dict[str, Any]:
    return {
        "benchmark": "flip",
        "environment": {
            **this_machine(simulated=False),
            "model": options.model or {"hidden": options.hidden, "layers": options.layers},
            **{name: getattr(options, name) for name in _SETTINGS},
            "rates": list(rates),
        },
        "runs": [
            {
                "policy": name,
                "seed": options.first_seed + number,
                "requests": len(latencies),
                "completed": len(latencies),
                "jct_s": summary(np.asarray(latencies)),
            }
            for name, rounds in readings.rounds.items()
            for number, latencies in enumerate(rounds)
        ],
        "flips": [vars(one) for one in flips],
        "comparisons": [comparison(readings, FLIPPING, name) for name in readings.rounds if name != FLIPPING],
    }
