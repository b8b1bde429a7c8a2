"""Policies on the live stack: the same videos at the same times under each, in turns; with --parity, the simulator too.

Every round is one seed's Poisson arrivals, run under each policy on a fresh stack whose slots have one thread each,
the order changing from round to round. A latency runs from the moment a video is asked for until the client hears that
it is completed. The policies decide by a profile that is measured first, on this machine.
"""

import argparse
import asyncio
import os
import platform
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np

from common.policies.registry import UnknownPolicy, make_policy
from common.policies.rib import Rib, WrongRib
from loadgen.bench.live import live_stack
from loadgen.bench.parity import parities
from loadgen.bench.process import ROOT, BenchmarkError, located
from loadgen.bench.rounds import Readings, comparison, lines
from loadgen.random_model import save_random_model
from loadgen.simulator.outcome import summary
from loadgen.workloads import (
    MIXES,
    Mix,
    Pattern,
    UnknownMix,
    Workload,
    WrongMix,
    make_workload,
    mix_named,
    saturation_rate,
)

_POLICIES = ("sdop:1", "sdop:2", "ddit", "elastic")


class WrongArgument(ValueError):
    """An argument that makes no sense; the message says what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--policy", nargs="+", metavar="NAME", help=f"(default: {' '.join(_POLICIES)})")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default %(default)s)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="of a round (default %(default)s)")
    parser.add_argument("--load", type=float, default=0.6, help="share of saturation (default %(default)s)")
    parser.add_argument("--mix", default="even", metavar="NAME", help=f"of {', '.join(MIXES)} (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of each video (default %(default)s)")
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="of the first round")
    parser.add_argument(
        "--video-model", metavar="PATH|NAME", help="(default: random weights, 512 to 3,072 tokens, made on the spot)"
    )
    parser.add_argument("--rib", type=Path, metavar="FILE", help="a profile of this machine (default: measured first)")
    parser.add_argument("--parity", action="store_true", help="compare with the simulator")


@dataclass(frozen=True)
class _Setting:
    """What all rounds have in common."""

    policies: tuple[str, ...]
    rib: Rib
    rib_file: Path
    model: str
    slots: int
    rate: float
    workloads: tuple[Workload, ...]


def run(options: argparse.Namespace) -> dict[str, object]:
    """Profile, run the rounds, print, and return what ``--json`` writes."""
    try:
        _check(options)
        with TemporaryDirectory(prefix="ddit-live-") as folder:
            return asyncio.run(_run(options, Path(folder)))
    except (WrongArgument, WrongMix, WrongRib, UnknownMix, UnknownPolicy, BenchmarkError) as error:
        raise SystemExit(f"loadgen bench ddit-live: {error}") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        what = f"{type(error).__name__} {error}".strip()
        raise SystemExit(f"loadgen bench ddit-live: the stack did not answer ({what})") from None


async def _run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    setting = await _setting(options, folder)
    print("\n".join(_heading(setting, options)))
    latencies: dict[str, list[list[float]]] = {policy: [] for policy in setting.policies}
    for number, workload in enumerate(setting.workloads):
        for policy in _turn(setting.policies, number):
            latencies[policy].append(await _measure(policy, workload, setting))
            whole = summary(np.asarray(latencies[policy][-1]))
            place = f"round {number + 1} of {options.rounds}, {policy}"
            print(f"  {place}: mean {whole['mean']:.2f} s, p99 {whole['p99']:.2f} s", flush=True)
    readings = Readings(latencies)
    print("\n".join(lines(readings)))
    result = _result(setting, options, readings)
    if options.parity:
        found = parities(latencies, setting.workloads, setting.rib, setting.slots)
        print("\n".join(parity.text for parity in found))
        result["parity"] = [parity.as_dict() for parity in found]
    return result


async def _setting(options: argparse.Namespace, folder: Path) -> _Setting:
    """The model, the profile, the rate and the requests of every round."""
    if options.video_model is None:
        model = str(await asyncio.to_thread(save_random_model, folder / "model"))
    else:
        model = located(options.video_model)
    rib_file = options.rib.resolve() if options.rib is not None else await _profile(model, options.slots, folder)
    rib = Rib.from_json(rib_file.read_text(encoding="utf-8"))
    kinds = tuple(rib.profiles)
    # An even mix is one of any number of kinds.
    mix = Mix("even", (1.0,) * len(kinds)) if options.mix == "even" else mix_named(options.mix)
    rate = options.load * saturation_rate(rib, kinds, mix, options.slots, options.steps)
    workloads = tuple(
        make_workload(kinds, mix, Pattern.POISSON, rate, options.requests, seed, options.steps)
        for seed in range(options.first_seed, options.first_seed + options.rounds)
    )
    return _Setting(_policies(options.policy), rib, rib_file, model, options.slots, rate, workloads)


async def _profile(model: str, slots: int, folder: Path) -> Path:
    """The RIB file that ``triptych profile`` writes here."""
    target = folder / "rib.json"
    command = [sys.executable, "-m", "compose.cli", "profile", "--video-model", model, "--output", str(target)]
    process = await asyncio.create_subprocess_exec(
        *command, "--slots", str(slots), cwd=ROOT, env=_environment(), stdin=DEVNULL
    )
    if await process.wait():
        raise BenchmarkError("the machine could not be profiled; the reason stands above")
    return target


async def _measure(policy: str, workload: Workload, setting: _Setting) -> list[float]:
    async with live_stack(policy, setting.rib_file, setting.model, setting.slots, _environment()) as stack:
        await stack.warm_up(workload, setting.slots)
        return await stack.run(workload)


def _turn(policies: Sequence[str], number: int) -> list[str]:
    """Who begins changes from round to round."""
    first = number % len(policies)
    return [*policies[first:], *policies[:first]]


def _policies(asked: Sequence[str] | None) -> tuple[str, ...]:
    """Those asked for; otherwise all of ours that this build has."""
    if asked:
        return tuple(dict.fromkeys(asked))
    there = []
    for name in _POLICIES:
        try:
            make_policy(name)
            there.append(name)
        except UnknownPolicy:
            print(f"{name} is left out: this build has no such policy")
    return tuple(there)


def _heading(setting: _Setting, options: argparse.Namespace) -> list[str]:
    kinds = ", ".join(f"{kind.width}x{kind.height}" for kind in setting.rib.profiles)
    return [
        f"{options.rounds} rounds of {options.requests} videos of {options.steps} steps, {setting.rate:.3f} a second "
        f"({options.load:g} of saturation) on {setting.slots} slots, mix {options.mix} of {kinds}"
    ]


def _result(setting: _Setting, options: argparse.Namespace, readings: Readings) -> dict[str, object]:
    runs = [
        {
            "policy": policy,
            "rate": setting.rate,
            "load": options.load,
            "mix": options.mix,
            "gpus": setting.slots,
            "seed": options.first_seed + number,
            "requests": options.requests,
            "completed": len(latencies),
            "latency_s": summary(np.asarray(latencies)),
        }
        for policy, rounds in readings.rounds.items()
        for number, latencies in enumerate(rounds)
    ]
    policies = list(readings.rounds)
    return {
        "benchmark": "ddit-live",
        "environment": {
            "simulated": False,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "rib": setting.rib.to_json(),
            "steps": options.steps,
        },
        "runs": runs,
        "comparisons": [
            comparison(readings, ours, theirs) for index, ours in enumerate(policies) for theirs in policies[:index]
        ],
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "TRIPTYCH_THREADS": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def _check(options: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("requests", 2), ("steps", 1), ("slots", 1)):
        if getattr(options, name) < least:
            raise WrongArgument(f"--{name} {getattr(options, name)}: give {least} or more")
    if options.load <= 0:
        raise WrongArgument(f"--load {options.load:g}: give a share of saturation above 0, for example 0.6")
    if options.rib is not None and not options.rib.is_file():
        raise WrongArgument(f"--rib {options.rib}: there is no such file; triptych profile writes one")
    mix_named(options.mix)
    for name in options.policy or ():
        make_policy(name)
