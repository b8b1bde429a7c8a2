"""Policies on the live stack: the same videos at the same times under each, in turns; with --parity, the simulator too.

Every round is one seed's Poisson arrivals, run under each policy on a fresh stack whose slots have one thread each,
the order changing from round to round. A latency runs from the moment a video is asked for until the client hears that
it is completed. The policies decide by a profile that is measured first, on this machine. ``--continue`` adds rounds to
those of an earlier run, by its profile and setting: what is said at the end is said of all of them.
"""

import argparse
import asyncio
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.policies.video.registry import UnknownPolicy, make_policy
from common.policies.video.rib import Rib, WrongRib
from loadgen.bench.answering import answering
from loadgen.bench.live import live_stack
from loadgen.bench.parity import parities
from loadgen.bench.process import BenchmarkError, completed, located
from loadgen.bench.rounds import Readings, comparison, lines
from loadgen.bench.series import Series, WrongSeries, read_series
from loadgen.counts import not_negative
from loadgen.environment import this_machine
from loadgen.random_model import save_random_model
from loadgen.refusal import WrongArgument, text_of
from loadgen.simulator.outcome import summary
from loadgen.workloads import MIXES, UnknownMix, Workload, WrongMix, mix_named

_PROFILE = ("--language-model", "none", "--in-stack", "--repeats", "10")
_POLICIES = ("sdop:1", "sdop:2", "ddit", "elastic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--policy", nargs="+", metavar="NAME", help=f"(default: {' '.join(_POLICIES)})")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="to run now (default %(default)s)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="of a round (default %(default)s)")
    parser.add_argument("--load", type=float, default=0.6, help="share of saturation (default %(default)s)")
    parser.add_argument("--mix", default="even", metavar="NAME", help=f"of {', '.join(MIXES)} (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of each video (default %(default)s)")
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first-seed", type=not_negative, default=0, metavar="N", help="of the first round")
    parser.add_argument(
        "--video-model", metavar="PATH|NAME", help="(default: random weights, 512 to 3,072 tokens, made on the spot)"
    )
    parser.add_argument("--rib", type=Path, metavar="FILE", help="a profile of this machine (default: measured first)")
    parser.add_argument("--parity", action="store_true", help="compare with the simulator")
    parser.add_argument(
        "--continue",
        type=Path,
        metavar="OUT",
        dest="earlier",
        help="go on with the rounds of an earlier run's --json; of the options, only --rounds and --parity count then",
    )


@dataclass(frozen=True)
class _Setting:
    """What a stack is started with."""

    rib_file: Path
    model: str
    slots: int


def run(options: argparse.Namespace) -> dict[str, object]:
    """Profile, run the rounds, print, and return what ``--json`` writes."""
    try:
        _check(options)
        with TemporaryDirectory(prefix="ddit-live-") as folder, answering():
            return asyncio.run(_run(options, Path(folder)))
    except (WrongMix, WrongRib, WrongSeries, UnknownMix, UnknownPolicy) as error:
        raise WrongArgument(str(error)) from None


async def _run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    if options.earlier is not None:
        series, readings = read_series(options.earlier)
    else:
        series, readings = await _new_series(options, folder)
    setting = await _setting(series, folder)
    before = readings.count
    print(_heading(series, options.rounds))
    for number in range(before, before + options.rounds):
        workload = series.workload(number)
        latencies = {}
        for policy in series.turn(number):
            latencies[policy] = await _measure(policy, workload, setting)
            whole = summary(np.asarray(latencies[policy]))
            place = f"round {number + 1}, seed {series.first_seed + number}, {policy}"
            print(f"  {place}: mean {whole['mean']:.2f} s, p99 {whole['p99']:.2f} s", flush=True)
        readings = readings.with_round(latencies)
    print(f"{readings.count} rounds, {before} of them from before")
    print("\n".join(lines(readings)))
    result = _result(series, readings)
    if options.parity:
        workloads = [series.workload(number) for number in range(readings.count)]
        found = parities(readings.rounds, workloads, series.rib, series.slots)
        print("\n".join(parity.text for parity in found))
        result["parity"] = [parity.as_dict() for parity in found]
    return result


async def _new_series(options: argparse.Namespace, folder: Path) -> tuple[Series, Readings]:
    """By the options, without a round yet; the profile is measured where none is given."""
    model = located(options.video_model, "--video-model") if options.video_model is not None else ""
    policies = _policies(options.policy)
    if options.rib is not None:
        rib_file = options.rib
    else:
        rib_file = await _profile(model or str(_random_model(folder)), options.slots, folder)
    series = Series(
        policies=policies,
        rib=Rib.from_json(text_of(rib_file, "--rib")),
        model=model,
        slots=options.slots,
        steps=options.steps,
        requests=options.requests,
        load=options.load,
        mix=options.mix,
        first_seed=options.first_seed,
    )
    return series, Readings({policy: [] for policy in policies})


async def _setting(series: Series, folder: Path) -> _Setting:
    model = series.model or str(await asyncio.to_thread(_random_model, folder))
    rib_file = folder / "rib-of-the-series.json"
    rib_file.write_text(series.rib.to_json(), encoding="utf-8")
    return _Setting(rib_file, model, series.slots)


def _random_model(folder: Path) -> Path:
    """Always the same weights."""
    model = folder / "model"
    return model if model.exists() else save_random_model(model)


async def _profile(model: str, slots: int, folder: Path) -> Path:
    """The RIB file that ``triptych profile`` writes here: of a stack at work, as policies run in one."""
    target = folder / "rib.json"
    command = [sys.executable, "-m", "compose.cli", "profile", "--video-model", model, "--output", str(target)]
    if await completed(*command, "--slots", str(slots), *_PROFILE, environment=_environment()):
        raise BenchmarkError("the machine could not be profiled; the reason stands above")
    return target


async def _measure(policy: str, workload: Workload, setting: _Setting) -> list[float]:
    async with live_stack(policy, setting.rib_file, setting.model, setting.slots, _environment()) as stack:
        await stack.warm_up(workload, setting.slots)
        return await stack.run(workload)


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


def _heading(series: Series, rounds: int) -> str:
    kinds = ", ".join(f"{kind.width}x{kind.height}" for kind in series.rib.profiles)
    return (
        f"{rounds} rounds of {series.requests} videos of {series.steps} steps, {series.rate:.3f} a second "
        f"({series.load:g} of saturation) on {series.slots} slots, mix {series.mix} of {kinds}"
    )


def _result(series: Series, readings: Readings) -> dict[str, object]:
    runs = [
        {
            "policy": policy,
            "rate": series.rate,
            "load": series.load,
            "mix": series.mix,
            "gpus": series.slots,
            "seed": series.first_seed + number,
            "requests": series.requests,
            "completed": len(latencies),
            "latency_s": summary(np.asarray(latencies)),
            "latencies_s": list(latencies),
        }
        for policy, rounds in readings.rounds.items()
        for number, latencies in enumerate(rounds)
    ]
    policies = list(readings.rounds)
    return {
        "benchmark": "ddit-live",
        "environment": {
            **this_machine(simulated=False),
            "rib": series.rib.to_json(),
            "steps": series.steps,
        },
        "series": series.as_dict(),
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
    if not 0 < options.load < math.inf:
        raise WrongArgument(f"--load {options.load:g}: give a share of saturation above 0, for example 0.6")
    if options.rib is not None and not options.rib.is_file():
        raise WrongArgument(f"--rib {options.rib}: there is no such file; triptych profile writes one")
    mix_named(options.mix)
    for name in options.policy or ():
        make_policy(name)
