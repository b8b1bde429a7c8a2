"""``loadgen sim``: scheduling policies in virtual time, on as many GPUs as you like.

``--experiment ddit`` measures every policy at the points of the paper's evaluation (``loadgen/simulator/points.py``)
and writes the JSON that ``loadgen report`` makes a page of. ``--day`` simulates one day and says how long that took.
``--record`` simulates the requests of a recorded run.

``--experiment tetriinfer`` does so for language (``loadgen/simulator/language/experiment.py``), and ``--trace`` for the
requests of a trace of production. ``--experiment memserve`` and ``--format mooncake`` do so for caching and routing, on
traces that tell which prompts begin alike (``loadgen/simulator/memserve``).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.policies.video.registry import UnknownPolicy, make_policy, policy_names
from common.policies.video.rib import Rib, WrongRib, paper_rib
from loadgen.environment import this_machine
from loadgen.refusal import Refused, WrongArgument, check_written, text_of
from loadgen.simulator.cost import CostModel, Noise, Overheads
from loadgen.simulator.experiment import Plan, print_summary, run_experiment
from loadgen.simulator.language.arms import UnknownArm
from loadgen.simulator.language.experiment import (
    GPUS_PER_INSTANCE,
    language_environment,
    print_language_summary,
    run_tetriinfer,
    run_trace,
)
from loadgen.simulator.language.instance import CannotServe
from loadgen.simulator.language.points import POINTS as TETRIINFER_POINTS
from loadgen.simulator.language.workloads import WrongTrace, azure_requests
from loadgen.simulator.loop import Stuck
from loadgen.simulator.points import NAMES, WrongSize, check_gpus
from loadgen.simulator.replay import WrongRecord, from_lines
from loadgen.simulator.single import simulate_day, simulate_record
from loadgen.simulator.sweep import Setting
from loadgen.simulator.write import write_experiment
from loadgen.workloads import MIXES, UnknownMix, WrongMix, mix_named

EXPERIMENTS = ("ddit", "tetriinfer", "memserve")
TRACES = {"azure": azure_requests}
SIZES = (8, 64)


_MISTAKES = (
    UnknownPolicy,
    UnknownArm,
    UnknownMix,
    WrongMix,
    WrongSize,
    WrongRib,
    WrongRecord,
    WrongTrace,
    WrongArgument,
    CannotServe,
    Stuck,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to simulate (default: --experiment ddit)").add_mutually_exclusive_group()
    what.add_argument("--experiment", choices=EXPERIMENTS, default="ddit", help="a paper's evaluation")
    what.add_argument("--day", action="store_true", help="one day; prints the seconds that it took")
    what.add_argument("--trace", type=Path, metavar="FILE", help="chats of a trace; --format says of which form it is")
    what.add_argument("--record", type=Path, metavar="FILE", help="the requests of a recorded run, on its slots")
    parser.add_argument("--speed", type=float, default=1.0, help="with --trace: how many times as fast requests come")
    parser.add_argument(
        "--policy", nargs="+", metavar="NAME", help="only these (default: all but fifo, which is sdop:1; --day: ddit)"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="in servers of 8 (default: 8 and 64; --day: 64); a language instance has 2 (default: 8; --trace: 16)",
    )
    parser.add_argument("--format", choices=(*TRACES, "mooncake"), default="azure", help="of --trace (default: azure)")
    parser.add_argument("--mix", nargs="+", metavar="NAME", help=f"only these, of {', '.join(MIXES)}")
    parser.add_argument(
        "--point",
        nargs="+",
        metavar="NAME",
        help=f"only these, of {', '.join(NAMES)}; of tetriinfer's, {', '.join(TETRIINFER_POINTS)}",
    )
    parser.add_argument("--load", type=float, default=0.8, help="with --day: the load, of saturation (default: 0.8)")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of every policy at every point (default: 20)")
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="videos in a run (default: by the number of GPUs); of --trace, the first N",
    )
    parser.add_argument("--rib", type=Path, metavar="FILE", help="a profile (default: the paper's figures)")
    parser.add_argument("--step-240p", type=float, metavar="S", help="the paper's 240p step on one GPU (default: 0.25)")
    parser.add_argument("--no-overheads", action="store_true", help="changes of a lease take no time (default: 1 ms)")
    parser.add_argument("--noise", type=float, default=0.0, metavar="SPREAD", help="spread of the videos' own speeds")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--quick", action="store_true", help="8 GPUs, three loads, 3 seeds, 100 videos")
    parser.add_argument("--json", dest="out", type=Path, metavar="OUT", help="write the runs here")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Carry out the command; the JSON is written here, one run a line.

    Raises:
        SystemExit: with one line that says what is wrong and what to change.
    """
    try:
        _check(options)
        result = _memserve(options) if _is_memserve(options) else _result(options)
    except _MISTAKES as error:
        raise Refused(f"loadgen sim: {error}") from None
    if options.out is not None:
        write_experiment(options.out, result)
    if result["experiment"] == "ddit":
        print_summary(result["runs"])
    elif result["experiment"] in ("tetriinfer", "trace"):
        print_language_summary(result["runs"])
    return result


def _is_memserve(options: argparse.Namespace) -> bool:
    return options.experiment == "memserve" or (options.trace is not None and options.format == "mooncake")


def _memserve(options: argparse.Namespace) -> dict[str, Any]:
    # Its instances' memory is the live one, which is made of tensors: torch takes seconds to load.
    from loadgen.simulator.memserve.command import run_memserve

    return run_memserve(options)


def _result(options: argparse.Namespace) -> dict[str, Any]:
    if options.trace is not None or options.experiment == "tetriinfer":
        return _language_result(options)
    rib = _rib(options)
    overheads = Overheads.none() if options.no_overheads else Overheads()
    environment = _environment(rib, overheads, options)
    cost = CostModel(rib, overheads, Noise(options.noise))
    if options.day:
        mix = mix_named((options.mix or ["even"])[0])
        runs = simulate_day(options.policy or ["ddit"], cost, options.gpus or 64, mix, options.load, options.requests)
        return {"experiment": "day", "environment": environment, "runs": runs}
    if options.record is not None:
        recorded = from_lines(text_of(options.record, "--record"))
        runs = simulate_record(options.policy or policy_names(), cost, recorded)
        return {"experiment": "record", "environment": environment, "runs": runs}
    found = run_experiment(_plan(options), Setting(rib.to_json(), overheads, options.noise))
    environment["wall_s"] = found.pop("wall_s")
    return {"experiment": "ddit", "environment": environment, **found}


def _language_result(options: argparse.Namespace) -> dict[str, Any]:
    environment = _machine() | language_environment()
    if options.trace is not None:
        requests = TRACES[options.format](text_of(options.trace, "--trace"))[: options.requests]
        instances = (options.gpus or 16) // GPUS_PER_INSTANCE
        environment["trace"] = f"{options.trace.name}, {len(requests):,} requests"
        runs = run_trace(requests, options.policy, instances, options.workers)
        return {"experiment": "trace", "environment": environment, "runs": runs}
    found = run_tetriinfer(
        options.policy,
        options.seeds or (2 if options.quick else 10),
        options.point or TETRIINFER_POINTS,
        options.gpus // GPUS_PER_INSTANCE if options.gpus else None,
        options.workers,
        options.quick,
    )
    environment["wall_s"] = found.pop("wall_s")
    return {"experiment": "tetriinfer", "environment": environment, **found}


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        # fifo is sdop:1 under another name (a test holds that): its points would cover the other's.
        policies=tuple(options.policy or (name for name in policy_names() if name != "fifo")),
        sizes=(options.gpus,) if options.gpus else SIZES[:1] if options.quick else SIZES,
        mixes=tuple(mix_named(name) for name in options.mix or MIXES),
        seeds=options.seeds or (3 if options.quick else 20),
        requests=options.requests,
        points=tuple(options.point or NAMES),
        quick=options.quick,
        workers=options.workers,
    )


def _rib(options: argparse.Namespace) -> Rib:
    if options.rib is not None:
        return Rib.from_json(text_of(options.rib, "--rib"))
    return paper_rib(options.step_240p or 0.25)


def _check(options: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("requests", 2), ("workers", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise WrongArgument(f"--{name} {value}: give {least} or more")
    if not 0 <= options.noise < math.inf:
        raise WrongArgument(f"--noise {options.noise}: give 0 or more")
    if not 0 < options.load < math.inf:
        raise WrongArgument(f"--load {options.load}: give a share of saturation above 0, for example 0.8")
    if options.rib is not None and options.step_240p is not None:
        raise WrongArgument("--step-240p belongs to the paper's table: leave it out when you give --rib")
    if options.step_240p is not None and not 0 < options.step_240p < math.inf:
        raise WrongArgument(f"--step-240p {options.step_240p}: give seconds above 0, for example 0.15")
    if options.rib is not None and not options.rib.is_file():
        raise WrongArgument(f"--rib {options.rib}: there is no such file; triptych profile writes one")
    if options.record is not None and not options.record.is_file():
        raise WrongArgument(f"--record {options.record}: there is no such file")
    if options.out is not None:
        check_written(options.out, "--json")
    if not 0 < options.speed < math.inf:
        raise WrongArgument(f"--speed {options.speed}: give a number above 0, for example 2")
    if options.trace is not None and not options.trace.is_file():
        raise WrongArgument(f"--trace {options.trace}: there is no such file")
    if _is_memserve(options):
        if options.gpus is not None and options.gpus < 1:
            raise WrongArgument(f"--gpus {options.gpus}: give the number of instances, 1 or more")
        return
    if options.gpus is not None:
        check_gpus(options.gpus)
    language = options.trace is not None or options.experiment == "tetriinfer"
    points = TETRIINFER_POINTS if language else NAMES
    for name in options.point or ():
        if name not in points:
            raise WrongArgument(f"--point {name}: there are {', '.join(points)}")
    if language:
        if options.gpus is not None and options.gpus < 4 * GPUS_PER_INSTANCE:
            raise WrongArgument(f"--gpus {options.gpus}: give 8 or more, that is 4 instances of 2 GPUs")
        return
    for name in options.policy or ():
        make_policy(name)
    for name in options.mix or ():
        mix_named(name)


def _environment(rib: Rib, overheads: Overheads, options: argparse.Namespace) -> dict[str, Any]:
    return {
        **_machine(),
        "rib": rib.to_json(),
        "rib_from": str(options.rib) if options.rib else "the paper's figures (common.policies.video.rib.paper_rib)",
        "overheads_s": {name: getattr(overheads, name) for name in overheads.__slots__},
        "noise": options.noise,
        "saturation": "GPUs over the mean GPU-seconds of a request at degree 1, VAE included",
    }


def _machine() -> dict[str, Any]:
    return {
        **this_machine(simulated=True),
        "numpy": np.__version__,
    }
