"""Kill -9 of instances, cache stores and the scheduler while a trace is replayed: answers, trees and hits afterwards.

On each topology, three parts of the trace: one undisturbed, one while processes are killed one after the other, one
when all are back. Every answer of all three is compared with transformers' ``generate``. Between the second and the
third, what the scheduler takes each instance to have is compared with what it has. The metric is the achieved hit
beside the best available one; see ``memserve-live``.
"""

import argparse
import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.bus.nats_bus import NatsBus
from common.policies.language.chat_rule import CHAT_RULES
from common.policies.language.routing_rules import UnknownRule, make_rule
from common.runtime.membership import MembershipView
from common.runtime.ports import free_port
from loadgen.bench.answering import answering
from loadgen.bench.greedy_answers import GreedyAnswers
from loadgen.bench.index_agreement import agreement
from loadgen.bench.kills import Killer
from loadgen.bench.language_stack import LanguageStack, Replay, stack_of
from loadgen.bench.memserve_live import hits
from loadgen.bench.trace_excerpt import SmallRequest, excerpt
from loadgen.counts import not_negative, width
from loadgen.environment import this_machine
from loadgen.random_language_model import VOCABULARY, save_random_language_model
from loadgen.refusal import WrongArgument
from loadgen.simulator.language.workloads import WrongTrace
from loadgen.simulator.memserve.trace import read_mooncake
from loadgen.simulator.memserve.turns import Turn
from loadgen.simulator.outcome import summary

# Prefill instances, and those that decode; fused ones do both.
TOPOLOGIES = {"fused": (0, 3, "fused"), "split": (2, 2, "decode"), "mixed": (1, 2, "fused")}
_STORES = 2
_PARTS = ("before", "during", "after")
# How much less of the best available hit may be achieved afterwards.
_MARGIN = 0.05
_AGREEMENT_S = 60.0
# A member is lost when it has been silent for so long.
_MEMBER_TIMEOUT_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    # Behind an option that takes several names it would be taken for one more of them.
    parser.usage = "%(prog)s FILE [options]"
    parser.add_argument("trace", type=Path, metavar="FILE", help="in Mooncake's format")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="on each topology (default %(default)s)")
    parser.add_argument("--topology", nargs="+", default=["fused", "split"], metavar="NAME", help=", ".join(TOPOLOGIES))
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="of a part (default %(default)s)")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second (default %(default)s)")
    parser.add_argument("--rule", default="cost", metavar="NAME", help="of routing (default %(default)s)")
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of conversations, victims and moments"
    )
    parser.add_argument("--hidden", type=width, default=128, metavar="N", help="channels of the model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="(default %(default)s)")
    parser.add_argument("--kv-mb", type=int, default=32, metavar="N", help="of an instance (default %(default)s)")


@dataclass
class Part:
    """Requests that were replayed, and what came of them."""

    requests: list[SmallRequest] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)

    async def replay(self, stack: LanguageStack, requests: Sequence[SmallRequest]) -> None:
        """Replay these too."""
        self.replays.append(await stack.replay(requests))
        self.requests += requests

    @property
    def answers(self) -> list[tuple[SmallRequest, str]]:
        """Each request with the text that came."""
        texts = [text for replay in self.replays for text in replay.texts]
        return list(zip(self.requests, texts, strict=True))


@dataclass(frozen=True)
class Outcome:
    """Of one topology. ``agreed_s``: how long after the last answer trees agreed on ``blocks``, by instance."""

    parts: dict[str, Part]
    killed: list[str]
    agreed_s: float
    blocks: dict[str, int]
    wrong: list[str]
    cut_short: int

    @property
    def recovered(self) -> bool:
        """Whether as much of the best available hit is achieved as before, but for the margin."""
        # More than all of it was achieved where what was being computed when a prompt was routed was there in time.
        return self._of_best("after") >= min(1.0, self._of_best("before")) - _MARGIN

    def _of_best(self, part: str) -> float:
        return hits(self.parts[part].replays)["of_best"]


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run each topology, print, and return what ``--json`` writes."""
    try:
        _check(options)
        turns = read_mooncake(options.trace)
        with TemporaryDirectory(prefix="memserve-kills-") as folder, answering():
            deviation = 1.6 / options.hidden**0.5
            model = save_random_language_model(
                Path(folder) / "random", options.hidden, options.layers, deviation=deviation
            )
            found = {name: asyncio.run(_measured(name, options, model, turns)) for name in options.topology}
    except (WrongTrace, UnknownRule) as error:
        raise WrongArgument(str(error)) from None
    return _result(options, found)


async def _measured(topology: str, options: argparse.Namespace, model: Path, turns: Sequence[Turn]) -> Outcome:
    prefills, decodes, role = TOPOLOGIES[topology]
    print(f"{topology}: {prefills} prefill, {decodes} {role}, {options.kills} kills", flush=True)
    port = free_port()
    settings = {
        "TRIPTYCH_ROLE": role,
        "TRIPTYCH_ROUTING": options.rule,
        "TRIPTYCH_PREFILL_TOKENS_S": "5000",
        "TRIPTYCH_NATS_PORT": str(port),
        "TRIPTYCH_KV_BYTES": str(options.kv_mb << 20),
    }
    counts = {"decode": decodes, "cache_store": _STORES, "dit": 1, "vae": 1}
    counts |= {"prefill": prefills} if prefills else {}
    instances = [f"prefill-{number}" for number in range(prefills)] + [f"decode-{number}" for number in range(decodes)]
    victims = [*instances, *(f"cache_store-{number}" for number in range(_STORES)), "scheduler-0"]
    async with (
        stack_of(str(model), counts, settings, VOCABULARY) as stack,
        await NatsBus.connect(f"nats://127.0.0.1:{port}", name="memserve-kills") as bus,
        MembershipView(bus, _MEMBER_TIMEOUT_S).running() as view,
    ):
        await stack.warm_up(len(instances))
        chance = random.Random(f"{options.seed} {topology}")
        killer = Killer(view, victims, chance, stack)
        parts = {name: Part() for name in _PARTS}
        seeds = iter(range(1000 * options.seed, 1000 * (options.seed + 1)))
        await parts["before"].replay(stack, _excerpt(turns, options, next(seeds)))
        killing = asyncio.create_task(killer.run(options.kills), name="kills")
        try:
            while not killing.done():
                await parts["during"].replay(stack, _excerpt(turns, options, next(seeds)))
        finally:
            killing.cancel()
            await asyncio.wait((killing,))
        killed = killing.result()
        at_rest_s = time.monotonic()
        blocks = await agreement(bus, instances, _AGREEMENT_S)
        agreed_s = time.monotonic() - at_rest_s
        await parts["after"].replay(stack, _excerpt(turns, options, next(seeds)))
    wrong, cut_short = await asyncio.to_thread(_compared, model, [parts[name] for name in _PARTS])
    outcome = Outcome(parts, killed, agreed_s, blocks, wrong, cut_short)
    print("\n".join(_lines(outcome)), flush=True)
    return outcome


def _excerpt(turns: Sequence[Turn], options: argparse.Namespace, seed: int) -> list[SmallRequest]:
    return excerpt(turns, options.requests, options.rate, seed, VOCABULARY)


def _compared(model: Path, parts: Sequence[Part]) -> tuple[list[str], int]:
    """What is wrong with answers, and how many could be compared only up to a near tie."""
    answers = [answer for part in parts for answer in part.answers]
    expected = GreedyAnswers(model).answers([(request.tokens, request.answer_tokens) for request, _ in answers])
    wrong = [
        f"after {len(request.tokens)} tokens of {request.conversation}: {text!r}, not {right}"
        for (request, text), right in zip(answers, expected, strict=True)
        if not right.agrees(text)
    ]
    return wrong, sum(not right.whole for right in expected)


def _lines(outcome: Outcome) -> list[str]:
    lines = []
    for name, part in outcome.parts.items():
        hit = hits(part.replays)
        whole = summary(np.concatenate([np.asarray(replay.ttft_s) for replay in part.replays]))
        lines.append(
            f"  {name:<6} {len(part.requests):>4} answers; hit {hit['cache_hit_ratio']:.3f} of "
            f"{hit['best_hit_ratio']:.3f}: {100 * hit['of_best']:.1f} %; TTFT mean {1000 * whole['mean']:.0f} ms, "
            f"max {1000 * whole['max']:.0f} ms"
        )
    answers = sum(len(part.requests) for part in outcome.parts.values())
    lines += [f"  WRONG {wrong}" for wrong in outcome.wrong]
    lines += [
        f"  {answers - len(outcome.wrong)} of {answers} answers right, {outcome.cut_short} compared up to a tie only",
        f"  trees agreed {outcome.agreed_s:.2f} s after the last answer: "
        + ", ".join(f"{name} {blocks} blocks" for name, blocks in outcome.blocks.items()),
        f"  the metric has {'recovered' if outcome.recovered else 'NOT RECOVERED'} (margin {100 * _MARGIN:.0f} %)",
    ]
    return lines


def _result(options: argparse.Namespace, found: dict[str, Outcome]) -> dict[str, object]:
    return {
        "benchmark": "memserve-kills",
        "environment": {
            **this_machine(simulated=False),
            "trace": options.trace.name,
            "model": {"hidden": options.hidden, "layers": options.layers},
        },
        "topologies": {
            name: {
                "killed": outcome.killed,
                "wrong": outcome.wrong,
                "cut_short": outcome.cut_short,
                "agreed_s": outcome.agreed_s,
                "blocks": outcome.blocks,
                "recovered": outcome.recovered,
                "parts": {
                    part: {
                        "answers": len(told.requests),
                        "ttft_s": summary(np.concatenate([np.asarray(replay.ttft_s) for replay in told.replays])),
                        **hits(told.replays),
                    }
                    for part, told in outcome.parts.items()
                },
            }
            for name, outcome in found.items()
        },
    }


def _check(options: argparse.Namespace) -> None:
    for name, least in (("kills", 1), ("requests", 2), ("layers", 1), ("kv_mb", 1)):
        if getattr(options, name) < least:
            raise WrongArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: give {least} or more")
    if not 0 < options.rate < math.inf:
        raise WrongArgument(f"--rate {options.rate:g}: give more than 0")
    for name in options.topology:
        if name not in TOPOLOGIES:
            raise WrongArgument(f"--topology {name}: use one of {', '.join(TOPOLOGIES)}")
    make_rule(options.rule, CHAT_RULES)
