"""Switching a group to a member set that is already known against a new one; with --step, what a group of two gains.

Every member is a process of its own here, with one thread. A reading begins when all have come together and ends when
the first member is in the group: for a known set that is a look-up and one number exchanged between all, for a new
one a meeting and the connections, right after the old ones were closed.
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from common.models.opensora.parallel import Parallelism, ParallelSTDiT3, SequenceParallelism
from common.models.opensora.stdit3 import PreparedText, STDiT3, STDiT3Config
from common.parallel.group import Group
from common.parallel.groups import Groups
from common.runtime.tether import tether_to_starter
from loadgen.bench.compare import Comparison, Side, compare
from loadgen.counts import count, several, width

_WARMUP = 2
_TIMEOUT_S = 120.0
# What DDiT's mechanism is promised to cost at most, by side.
_PROMISED_S = {"known": 1e-3, "new": 50e-3}
_FORMS = {
    "DSP": Parallelism(SequenceParallelism.DSP, guidance=False),
    "Ulysses": Parallelism(SequenceParallelism.ULYSSES, guidance=False),
    "guidance": Parallelism(guidance=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--pairs", type=several, help="readings of each side (default 101, with --step 7)")
    parser.add_argument("--step", action="store_true", help="measure one denoising step at degree 1 and 2 instead")
    parser.add_argument("--hidden", type=width, default=384, help="channels of the model (default %(default)s)")
    parser.add_argument("--depth", type=count, default=4, help="pairs of blocks of the model (default %(default)s)")
    parser.add_argument("--frames", type=count, default=8, help="latent frames (default %(default)s)")
    parser.add_argument("--side", type=count, default=32, help="latent height and width (default %(default)s)")


@dataclass(frozen=True)
class _Plan:
    """What all processes do, in the same order."""

    step: bool
    pairs: int
    hidden: int
    depth: int
    frames: int
    side: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return (2,) if self.step else (2, 4)

    @property
    def tokens(self) -> int:
        return self.frames * (self.side // 2) ** 2


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the other members, measure as their first, print, and return what ``--json`` writes."""
    pairs = options.pairs or (7 if options.step else 101)
    plan = _Plan(options.step, pairs, options.hidden, options.depth, options.frames, options.side)
    member = _Member(0, plan)
    context = multiprocessing.get_context("spawn")
    others: list[BaseProcess] = [
        context.Process(target=_serve, args=(rank, plan, member.address), daemon=True)
        for rank in range(1, max(plan.sizes))
    ]
    try:
        for process in others:
            process.start()
        comparisons = member.measure(member.address)
    finally:
        for process in others:
            process.kill()
            process.join()
    for comparison in comparisons:
        print(comparison.text())
        if not plan.step:
            print("\n".join(_promises(comparison)))
    return {"benchmark": "regroup", "comparisons": [comparison.as_dict() for comparison in comparisons]}


def _promises(comparison: Comparison) -> list[str]:
    lines = []
    for side in (comparison.ours, comparison.theirs):
        first, _, third = (1e3 * value for value in statistics.quantiles(side.seconds, n=4, method="inclusive"))
        promised_s = _PROMISED_S[side.name]
        verdict = "kept" if side.median_s < promised_s else "NOT kept"
        lines.append(
            f"  {side.name:<5}  quartiles {first:.3f} to {third:.3f} ms, slowest {1e3 * max(side.seconds):.3f} ms; "
            f"promised under {1e3 * promised_s:g} ms: {verdict}"
        )
    return lines


def _serve(rank: int, plan: _Plan, address: str) -> None:
    tether_to_starter()
    _Member(rank, plan).measure(address)


class _Member:
    """One process: measures with the others, all making the same moves."""

    def __init__(self, rank: int, plan: _Plan) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        self._plan = plan
        me = f"member-{rank}"
        self._groups = Groups(me, exchange_timeout_s=_TIMEOUT_S, meeting_timeout_s=_TIMEOUT_S)
        # Apart from what is measured: through these the members come together before each reading.
        self._waiting = Groups(me, exchange_timeout_s=_TIMEOUT_S, meeting_timeout_s=_TIMEOUT_S)
        self._token = 0
        self.address = self._groups.address

    def measure(self, address: str) -> list[Comparison]:
        """address: the first member's, where all groups meet."""
        comparisons = []
        for size in self._plan.sizes:
            # Members that join only now have counted fewer entries.
            self._token = size << 32
            if self._rank < size:
                ranks = list(range(size))
                gathering = self._enter(self._waiting, ranks, address)
                if self._plan.step:
                    comparisons += self._measure_steps(gathering)
                else:
                    comparisons.append(self._measure_regrouping(gathering, ranks, address))
        return comparisons

    def _enter(self, groups: Groups, ranks: list[int], address: str) -> Group:
        self._token += 1
        # A name apart for each kind of group, as both meet at the same place.
        token = 2 * self._token + (groups is self._waiting)
        return groups.enter([f"member-{rank}" for rank in ranks], address, token)

    def _measure_regrouping(self, gathering: Group, ranks: list[int], address: str) -> Comparison:
        known: list[float] = []
        new: list[float] = []
        for pair in range(-_WARMUP, self._plan.pairs):
            self._groups.close()
            new_s = self._timed_enter(gathering, ranks, address)
            self._enter(self._groups, ranks[::-1], address)
            known_s = self._timed_enter(gathering, ranks, address)
            if pair >= 0:
                new.append(new_s)
                known.append(known_s)
        title = f"regrouping to a set of {len(ranks)} members"
        return Comparison(title, Side("known", tuple(known)), Side("new", tuple(new)))

    def _timed_enter(self, gathering: Group, ranks: list[int], address: str) -> float:
        gathering.compare(0)
        started = time.perf_counter()
        self._enter(self._groups, ranks, address)
        return time.perf_counter() - started

    def _measure_steps(self, gathering: Group) -> list[Comparison]:
        plan = self._plan
        model = _model(plan)
        parallel = ParallelSTDiT3(model)
        latent, times, text = _inputs(plan, model)
        size = {"fps": 24.0, "height": 8.0 * plan.side, "width": 8.0 * plan.side}

        @torch.no_grad()
        def alone() -> None:
            if self._rank == 0:
                model(latent, times, text, **size)

        def together(parallelism: Parallelism) -> Tensor:
            gathering.compare(0)
            with torch.no_grad():
                return parallel.on(gathering, parallelism)(latent, times, text, **size)

        return [
            compare(
                lambda form=form: together(form),  # type: ignore[misc]
                alone,
                title=f"one guided step of {plan.tokens} tokens, {name} on 2 members of one thread each",
                names=(f"{name} 2", "degree 1"),
                pairs=plan.pairs,
                warmup=1,
            )
            for name, form in _FORMS.items()
        ]


def _model(plan: _Plan) -> STDiT3:
    torch.manual_seed(1)
    config = STDiT3Config(hidden_size=plan.hidden, depth=plan.depth, num_heads=8, caption_channels=64)
    return STDiT3(config).eval()


@torch.no_grad()
def _inputs(plan: _Plan, model: STDiT3) -> tuple[Tensor, Tensor, PreparedText]:
    """Both halves of a guided batch; the same on every member."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(1, 4, plan.frames, plan.side, plan.side, generator=generator).repeat(2, 1, 1, 1, 1)
    text = torch.randn(2, 1, 20, model.config.caption_channels, generator=generator)
    return latent, torch.full((2,), 500.0), model.prepare_text(text)
