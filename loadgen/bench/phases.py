"""Coupled and split serving of the paper's five classes on the live stack (TetriInfer, section 5.1).

All systems run at once, each idle but for its turn, and take turns burst by burst in an order that changes from round
to round; the requests of a round are the same for all. A TTFT runs from the burst's beginning to the first token's
arrival at the client, a JCT to the last one's.
"""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from loadgen.bench.answering import answering
from loadgen.bench.instance_use import watching
from loadgen.bench.language_stack import LanguageStack, stack_of
from loadgen.bench.phases_readings import Burst, Readings
from loadgen.bench.phases_systems import CONTINUOUS, FIXED, System, common_settings, systems
from loadgen.bench.phases_workload import TOKENS, Scale, kv_token_bytes, mean_lengths, requests_of, save_predictor
from loadgen.bench.process import BenchmarkError, located_folder
from loadgen.bench.trace_excerpt import SmallRequest
from loadgen.counts import width
from loadgen.environment import this_machine
from loadgen.random_language_model import save_random_language_model
from loadgen.refusal import WrongArgument
from loadgen.simulator.language.predictors import PAPER_ACCURACY
from loadgen.simulator.language.workloads import CLASSES

_BASES = (FIXED, CONTINUOUS)
_SYSTEMS = (FIXED, CONTINUOUS, "split", "split-predicting")
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}
# Of the random model, beyond which no prompt with its answer may come.
_CONTEXT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    names = ", ".join(systems(Scale(1.0)))
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="NAME", help=f"of {', '.join(CLASSES)}")
    parser.add_argument("--systems", nargs="+", default=list(_SYSTEMS), metavar="NAME", help=f"of {names}")
    parser.add_argument("--requests", type=int, metavar="N", help="of a burst (default: the paper's 128 or 32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="of the first round")
    parser.add_argument("--scale", type=float, default=0.25, help="of all that is counted in tokens (%(default)s)")
    parser.add_argument(
        "--accuracy", type=float, default=PAPER_ACCURACY[200], help="of predictions (default: the paper's %(default)s)"
    )
    parser.add_argument("--model", metavar="FOLDER", help="a published model (default: one with random weights)")
    parser.add_argument(
        "--hidden", type=width, default=512, metavar="N", help="channels of the random model (%(default)s)"
    )
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="(default %(default)s)")
    parser.add_argument("--precision", choices=tuple(_VALUE_BYTES), default="bfloat16", help="(default %(default)s)")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run the rounds, print, and return what ``--json`` writes."""
    _check(options)
    with TemporaryDirectory(prefix="phases-") as folder, answering("a stack"):
        model = _model(options, Path(folder) / "model")
        return asyncio.run(_run(options, model))


def _model(options: argparse.Namespace, folder: Path) -> Path:
    """The model with a predictor beside it; of a published one, its files are linked to."""
    if options.model is None:
        save_random_language_model(folder, options.hidden, options.layers, _CONTEXT)
    else:
        published = located_folder(options.model, "--model")
        folder.mkdir()
        for file in published.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
    save_predictor(folder, Scale(options.scale))
    return folder


async def _run(options: argparse.Namespace, model: Path) -> dict[str, object]:
    scale = Scale(options.scale)
    settings = common_settings(scale, kv_token_bytes(model, _VALUE_BYTES[options.precision]), options.precision)
    chosen = [systems(scale)[name] for name in options.systems]
    print("\n".join(_head(options, scale, chosen)), flush=True)
    readings = Readings({of: {system.name: [] for system in chosen} for of in options.classes})
    async with contextlib.AsyncExitStack() as exits:
        stacks = {}
        for system in chosen:
            stack = await exits.enter_async_context(
                stack_of(str(model), {"dit": 1, "vae": 1, **system.counts}, {**settings, **system.settings}, TOKENS)
            )
            await stack.warm_up(system.instances)
            stacks[system.name] = stack
        for number in range(options.rounds):
            await _round(options, scale, number, stacks, readings)
    for name in options.classes:
        print("\n".join((_title(options, scale, name), *readings.lines(name, _BASES))))
    return _result(options, scale, readings)


async def _round(
    options: argparse.Namespace, scale: Scale, number: int, stacks: dict[str, LanguageStack], readings: Readings
) -> None:
    """Every class once under every system."""
    names = list(stacks)
    for place, of in enumerate(options.classes):
        requests = requests_of(of, scale, options.first_seed + number, options.accuracy, options.requests)
        first = (number + place) % len(names)
        for name in (*names[first:], *names[:first]):
            burst = await _burst(stacks[name], requests)
            readings.add(of, name, burst)
            ttft_s, jct_s = (sum(values) / len(values) for values in (burst.ttft_s, burst.jct_s))
            said = f"TTFT {ttft_s:.3f} s, JCT {jct_s:.3f} s, resources {burst.resource_s:.2f} s"
            print(f"  round {number + 1}, {of}, {name}: {said}", flush=True)


async def _burst(stack: LanguageStack, requests: Sequence[SmallRequest]) -> Burst:
    """Ask for all at once.

    Raises:
        BenchmarkError: an answer is not as long as was asked for, or all was over too soon to see any work.
    """
    async with watching(stack.pid) as use:
        begin_s = time.monotonic()
        answers = await asyncio.gather(*map(stack.ask, requests))
    for request, answer in zip(requests, answers, strict=True):
        if answer.answer_tokens != request.answer_tokens:
            raise BenchmarkError(f"an answer has {answer.answer_tokens} tokens instead of {request.answer_tokens}")
    burst = Burst(
        [answer.asked_s - begin_s + answer.ttft_s for answer in answers],
        [answer.asked_s - begin_s + answer.jct_s for answer in answers],
        [request.answer_tokens for request in requests],
        use.of(begin_s),
    )
    if burst.resource_s <= 0:
        raise BenchmarkError("the instances were not seen to compute; ask for more")
    return burst


def _head(options: argparse.Namespace, scale: Scale, chosen: Sequence[System]) -> list[str]:
    """What is compared, and what is to be known of it."""
    model = options.model or f"random weights, {options.layers} layers of {options.hidden} channels"
    return [
        f"Whatever is counted in tokens is {scale.factor:g} of the paper's: chunks of {scale.chunk_tokens}, room for "
        f"{scale.kv_tokens} tokens an instance, ranges of {scale.buckets.granularity} predicted tokens.",
        f"Model: {model}, {options.precision}. An instance has one thread; gateway and client share their "
        f"{os.cpu_count()} cores.",
        f"Answers have exact lengths, whatever is said. Predictions are right in {options.accuracy:.1%}: each prompt's "
        "last token names a range, which a small classifier reads beside prefill.",
        "The scheduler knows how long each answer may become, here how long it is: coupled systems are balanced by it.",
        *(f"  {system.name}: {system.about}" for system in chosen),
    ]


def _title(options: argparse.Namespace, scale: Scale, name: str) -> str:
    requests = requests_of(name, scale, options.first_seed, options.accuracy, options.requests)
    prompt, answer = mean_lengths(requests)
    return (
        f"{name}: {len(requests)} requests at once, prompts of {prompt:.0f} tokens and answers of {answer:.0f} on "
        f"average, {options.rounds} rounds"
    )


def _result(options: argparse.Namespace, scale: Scale, readings: Readings) -> dict[str, object]:
    return {
        "benchmark": "phases",
        "environment": {
            **this_machine(simulated=False),
            "model": options.model or {"hidden": options.hidden, "layers": options.layers},
            "precision": options.precision,
            "scale": options.scale,
            "accuracy": options.accuracy,
        },
        "runs": [
            {
                "policy": system,
                "point": "live",
                "class": of,
                "rate": None,
                "gpus": systems(scale)[system].instances,
                "seed": options.first_seed + number,
                **burst.as_dict(),
            }
            for of, by_system in readings.rounds.items()
            for system, bursts in by_system.items()
            for number, burst in enumerate(bursts)
        ],
        "comparisons": readings.comparisons(_BASES),
    }


def _check(options: argparse.Namespace) -> None:
    for option, names, known in (
        ("classes", options.classes, CLASSES),
        ("systems", options.systems, systems(Scale(1.0))),
    ):
        for name in names:
            if name not in known:
                raise WrongArgument(f"--{option} {name}: there are {', '.join(known)}")
        if len(set(names)) < len(names):
            raise WrongArgument(f"--{option}: name each once")
    least = {"rounds": 1, "requests": 1, "layers": 1, "first_seed": 0}
    for name, at_least in least.items():
        if getattr(options, name) is not None and getattr(options, name) < at_least:
            raise WrongArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: give {at_least} or more")
    if not 0 < options.scale <= 2:
        raise WrongArgument(f"--scale {options.scale:g}: give more than 0, and 2 at most")
    if not 0 <= options.accuracy <= 1:
        raise WrongArgument(f"--accuracy {options.accuracy:g}: give a share from 0 to 1")
