"""Routing rules on the live stack: an excerpt of a trace with block ids, replayed under each rule in turns.

Every round is other conversations of the trace, run under each rule on a fresh stack of fused instances, whose caches
are cold; the order changes from round to round. A TTFT runs from the moment that a client asks until its first token
comes. The hit is the share of prompt tokens whose keys and values were there already, by the answers' usage; the best
available one is what it were, had each prompt gone to the instance with the most of it.
"""

import argparse
import asyncio
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.policies.language.chat_rule import CHAT_RULES
from common.policies.language.language_costs import LanguageCosts, WrongLanguageCosts
from common.policies.language.routing_rules import UnknownRule, make_rule
from loadgen.bench.answering import answering
from loadgen.bench.language_stack import Replay, Told, language_stack, profiled
from loadgen.bench.rounds import MEASURES, Readings, comparison
from loadgen.bench.trace_excerpt import excerpt
from loadgen.counts import not_negative, width
from loadgen.environment import this_machine
from loadgen.random_language_model import VOCABULARY, save_random_language_model
from loadgen.refusal import WrongArgument, text_of
from loadgen.simulator.language.workloads import WrongTrace
from loadgen.simulator.memserve.trace import read_mooncake
from loadgen.simulator.memserve.turns import Turn
from loadgen.simulator.outcome import summary

_RULES = ("least_load", "session", "cost", "added_time")
# Of what the best instance has, as the share that "cost" is to find at least.
_NEAR_BEST = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    # Behind an option that takes several names it would be taken for one more of them.
    parser.usage = "%(prog)s FILE [options]"
    parser.add_argument("trace", type=Path, metavar="FILE", help="in Mooncake's format")
    parser.add_argument("--rule", nargs="+", default=list(_RULES), metavar="NAME", help=f"of {', '.join(CHAT_RULES)}")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="of a round (default %(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second (default %(default)s)")
    parser.add_argument("--instances", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first-seed", type=not_negative, default=0, metavar="N", help="of the first round")
    parser.add_argument("--hidden", type=width, default=256, metavar="N", help="channels of the model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="(default %(default)s)")
    parser.add_argument(
        "--prefill-rate", type=float, metavar="TOKENS", help="of an instance, a second, in the place of a profile"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of triptych profile (default: measured first)")
    parser.add_argument(
        "--transfer-rate", type=float, default=20_000.0, metavar="TOKENS", help="a second (default %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run the rounds, print, and return what ``--json`` writes."""
    try:
        _check(options)
        turns = read_mooncake(options.trace)
        with TemporaryDirectory(prefix="memserve-live-") as folder, answering():
            model = save_random_language_model(Path(folder) / "random", options.hidden, options.layers)
            return asyncio.run(_run(options, turns, str(model), Path(folder)))
    except (WrongTrace, WrongLanguageCosts, UnknownRule) as error:
        raise WrongArgument(str(error)) from None


async def _run(options: argparse.Namespace, turns: Sequence[Turn], model: str, folder: Path) -> dict[str, object]:
    if options.prefill_rate:
        told = Told("", options.prefill_rate, options.transfer_rate)
    else:
        told = Told(str(options.profile) if options.profile else await profiled(model, folder))
    print(
        f"{options.rounds} rounds of about {options.requests} requests, {options.rate:g} a second, on "
        f"{options.instances} instances"
    )
    replays: dict[str, list[Replay]] = {rule: [] for rule in options.rule}
    for number in range(options.rounds):
        seed = options.first_seed + number
        requests = excerpt(turns, options.requests, options.rate, seed, VOCABULARY)
        first = number % len(options.rule)
        for rule in (*options.rule[first:], *options.rule[:first]):
            async with language_stack(rule, model, options.instances, VOCABULARY, told) as stack:
                await stack.warm_up(options.instances)
                replay = await stack.replay(requests)
            replays[rule].append(replay)
            print(f"  round {number + 1}, seed {seed}, {_line(rule, [replay])}", flush=True)
    readings = Readings({rule: [replay.ttft_s for replay in found] for rule, found in replays.items()})
    print(f"{options.rounds} rounds together")
    print("\n".join(_line(rule, found) for rule, found in replays.items()))
    print("\n".join(_ratios(readings)))
    return _result(options, told, replays, readings)


def hits(replays: Sequence[Replay]) -> dict[str, float]:
    """The share of prompt tokens that were cached, and that the best instance had; and of these, the former."""
    prompt, cached, best = (
        sum(getattr(replay, name) for replay in replays) for name in ("prompt_tokens", "cached_tokens", "best_tokens")
    )
    return {
        "cache_hit_ratio": cached / prompt if prompt else 0.0,
        "best_hit_ratio": best / prompt if prompt else 0.0,
        "of_best": cached / best if best else 1.0,
    }


def _line(rule: str, replays: Sequence[Replay]) -> str:
    whole = summary(np.concatenate([np.asarray(replay.ttft_s) for replay in replays]))
    hit = hits(replays)
    verdict = "" if rule != "cost" else " enough" if hit["of_best"] >= _NEAR_BEST else " TOO LITTLE"
    return (
        f"{rule:<11} TTFT mean {1000 * whole['mean']:7.1f} ms, p99 {1000 * whole['p99']:8.1f} ms; "
        f"hit {hit['cache_hit_ratio']:.3f} of {hit['best_hit_ratio']:.3f}: {100 * hit['of_best']:.1f} %{verdict}"
    )


def _ratios(readings: Readings) -> list[str]:
    return [
        f"{ours} over {theirs}: "
        + ", ".join(f"{measure} {readings.ratio(ours, theirs, measure).text}" for measure in MEASURES)
        for index, ours in enumerate(readings.rounds)
        for theirs in list(readings.rounds)[:index]
    ]


def _result(
    options: argparse.Namespace, told: Told, replays: Mapping[str, Sequence[Replay]], readings: Readings
) -> dict[str, object]:
    rules = list(replays)
    return {
        "benchmark": "memserve-live",
        "environment": {
            **this_machine(simulated=False),
            "trace": options.trace.name,
            "model": {"hidden": options.hidden, "layers": options.layers},
            **_told(told),
        },
        "runs": [
            {
                "policy": rule,
                "rate": options.rate,
                "gpus": options.instances,
                "seed": options.first_seed + number,
                "requests": len(replay.ttft_s),
                "completed": len(replay.ttft_s),
                "ttft_s": summary(np.asarray(replay.ttft_s)),
                **hits([replay]),
                "ttfts_s": replay.ttft_s,
            }
            for rule, found in replays.items()
            for number, replay in enumerate(found)
        ],
        "medians": {
            rule: {measure: statistics.median(readings.of(rule, measure)) for measure in MEASURES} for rule in rules
        },
        "hits": {rule: hits(found) for rule, found in replays.items()},
        "comparisons": [
            comparison(readings, ours, theirs) for index, ours in enumerate(rules) for theirs in rules[:index]
        ],
    }


def _told(told: Told) -> dict[str, object]:
    """The costs in full: the file may be a temporary one."""
    if told.profile:
        return {"costs": json.loads(Path(told.profile).read_text(encoding="utf-8"))["language_costs"]}
    return {"prefill_tokens_s": told.prefill_tokens_s, "transfer_tokens_s": told.transfer_tokens_s}


def _check(options: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("requests", 2), ("instances", 1), ("layers", 1)):
        if getattr(options, name) < least:
            raise WrongArgument(f"--{name} {getattr(options, name)}: give {least} or more")
    for name in ("rate", "prefill_rate", "transfer_rate"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            raise WrongArgument(f"--{name.replace('_', '-')} {getattr(options, name):g}: give more than 0")
    if options.profile is not None and LanguageCosts.from_json(text_of(options.profile, "--profile")) is None:
        raise WrongArgument(f"--profile {options.profile}: no language model was measured; triptych profile does")
    for name in options.rule:
        make_rule(name, CHAT_RULES)
