"""A language model served by our stack, fused and split, against another server of the same model, by the same client.

The client is ``vllm bench serve``, unchanged, from an environment of its own. Servers take turns run by run, every
round has its own prompts (no prefix of one is known from another), and what is compared is the median over the rounds.
For p99 over few requests read: the slowest.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import time
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

from loadgen.bench.llm_readings import Readings, Workload
from loadgen.bench.llm_servers import Server, other, running, stack
from loadgen.bench.process import BenchmarkError, line_of, located, started
from loadgen.counts import count, not_negative
from loadgen.refusal import WrongArgument

_CLIENT = Path(__file__).with_name("llm_client.py")
_RUN_TIMEOUT_S = 600.0
_MODES = ("fused", "split")
# For each at a time: enough that the slowest is no accident, few enough that a round stays short.
_REQUESTS_EACH = {1: 8, 4: 5}
_REQUESTS_EACH_BEYOND = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a published model with its tokenizer")
    parser.add_argument("--client", required=True, type=Path, metavar="VLLM", help="vLLM's executable, for its client")
    parser.add_argument("--modes", nargs="*", default=list(_MODES), choices=_MODES, help="stacks of ours to start")
    parser.add_argument("--peer", metavar="NAME=COMMAND", help="to compare with; {model} and {port} are filled in")
    parser.add_argument(
        "--running", action="append", default=[], metavar="NAME=URL", help="a server that runs already (repeatable)"
    )
    parser.add_argument("--reference", metavar="NAME", help="whom the others are compared with (default: the peer)")
    parser.add_argument("--concurrency", type=count, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--input", type=count, nargs="+", default=[256, 1024], metavar="N", help="tokens of a prompt")
    parser.add_argument(
        "--output", type=count, default=64, metavar="N", help="tokens of an answer (default %(default)s)"
    )
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument(
        "--first-seed",
        type=not_negative,
        metavar="N",
        help="of the first round's prompts (default: by the clock, as a server that runs on remembers earlier prompts)",
    )
    parser.add_argument(
        "--threads", type=count, default=os.cpu_count() or 1, help="of each server of ours, all together"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of ours")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start what is to be started, measure, print the table, and return what ``--json`` writes."""
    return asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> dict[str, object]:
    model = located(options.model, "--model")
    python = options.client.expanduser().resolve().with_name("python")
    if not python.exists():
        raise WrongArgument(f"--client {options.client}: there is no Python beside it, so it is no vLLM environment")
    there = [_pair("--running", pair) for pair in options.running]
    peers = [] if options.peer is None else [_pair("--peer", options.peer)]
    names = [name for name, _ in (*there, *peers)] + options.modes
    reference = options.reference or next((name for name, _ in peers), None)
    _check_names(names, reference)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    async with contextlib.AsyncExitStack() as exits:
        servers = [await running(name, url) for name, url in there]
        for name, command in peers:
            servers.append(await exits.enter_async_context(other(name, command, model)))
        for mode in options.modes:
            servers.append(await exits.enter_async_context(stack(mode, model, options.threads, options.precision)))
        client, _ = await exits.enter_async_context(started([str(python), str(_CLIENT)], environment))
        readings = await _measure(options, client, servers, model)
    print("\n".join(readings.lines(names, reference)))
    return {
        "benchmark": "llm",
        "environment": {"python": platform.python_version(), "cores": os.cpu_count(), "threads": options.threads},
        "servers": names,
        "reference": reference,
        "workloads": readings.as_dicts(names, reference),
    }


async def _measure(options: argparse.Namespace, client: Process, servers: list[Server], model: str) -> Readings:
    readings = Readings()
    first_seed = int(time.time()) if options.first_seed is None else options.first_seed
    workloads = [
        Workload(prompt, options.output, many, many * _REQUESTS_EACH.get(many, _REQUESTS_EACH_BEYOND))
        for prompt in options.input
        for many in options.concurrency
    ]
    for number in range(options.rounds):
        # Who begins changes from round to round.
        turn = servers[number % len(servers) :] + servers[: number % len(servers)]
        for place, workload in enumerate(workloads):
            seed = first_seed + number * len(workloads) + place
            for server in turn:
                result = await _one(client, server, workload, model, seed)
                readings.add(workload, server.name, result)
                speed, first = result["output_throughput"], result["median_ttft_ms"]
                said = f"{server.name}: {speed:.1f} tok/s, TTFT {first:.1f} ms, TPOT {result['median_tpot_ms']:.2f} ms"
                print(f"  round {number + 1}, {workload.text}, {said}", file=sys.stderr, flush=True)
    return readings


async def _one(client: Process, server: Server, workload: Workload, model: str, seed: int) -> dict[str, Any]:
    """One run of the client. Raises BenchmarkError if not every answer came whole."""
    arguments = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"]
    arguments += ["--model", server.model, "--tokenizer", model, "--dataset-name", "random"]
    arguments += ["--random-input-len", str(workload.prompt_tokens), "--random-output-len", str(workload.output_tokens)]
    arguments += ["--num-prompts", str(workload.requests), "--max-concurrency", str(workload.concurrency)]
    arguments += ["--num-warmups", str(workload.concurrency), "--temperature", "0", "--ignore-eos", "--disable-tqdm"]
    arguments += ["--seed", str(seed), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"]
    if client.stdin is None:
        raise BenchmarkError("the client has no input to write to")
    client.stdin.write(json.dumps(arguments).encode() + b"\n")
    await client.stdin.drain()
    result: dict[str, Any] = json.loads(await line_of(client, _RUN_TIMEOUT_S))
    whole = workload.requests * workload.output_tokens
    if result["completed"] != workload.requests or result["total_output_tokens"] != whole:
        told = f"{result['completed']} answers with {result['total_output_tokens']} tokens"
        raise BenchmarkError(f"{server.name}: {told} instead of {workload.requests} with {whole}")
    return result


def _pair(option: str, text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise WrongArgument(f"{option} {text}: give a name, '=', and what it stands for")
    return name, value


def _check_names(names: list[str], reference: str | None) -> None:
    """Raises WrongArgument: no server, two of a name, or none that the others are compared with."""
    if not names:
        raise WrongArgument("there is no server to measure: give --modes, --peer or --running")
    for name in names:
        if names.count(name) > 1:
            raise WrongArgument(f"two servers are called {name}: give each a name of its own")
    if reference is not None and reference not in names:
        raise WrongArgument(f"--reference {reference}: there are {', '.join(names)}")
