"""What the experiment runs: clusters and requests, point by point.

By the paper's sections: ``interference`` (2.2, no runs), ``prefill`` (5.2.1), ``burst`` (5.1), ``dispatch`` and
``reserve`` (5.2.3); and two that the paper has not: ``steady`` (its classes as Poisson processes on several instances)
and ``flip`` (a load that turns from decode to prefill).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.policies.language.decode_admission import AdmissionRule, VictimRule
from common.policies.language.flip import IdleFlip, QueueFlip
from common.policies.language.prefill_schedule import PrefillOrder
from loadgen.simulator.language.arms import burst_arms, chosen, coupled, fluid, steady_arms, tetriinfer
from loadgen.simulator.language.decode_only import RULES
from loadgen.simulator.language.link import V100_HOST
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.setups import Setup
from loadgen.simulator.language.verdicts import SWAPPING
from loadgen.simulator.language.workloads import (
    CLASSES,
    MIXED,
    SHAREGPT,
    class_requests,
    dispatch_requests,
    turning,
    turns,
)

POINTS = ("interference", "prefill", "burst", "dispatch", "reserve", "steady", "flip")
STEADY_INSTANCES = 4
# Requests a second for each class on four instances: between half and nine tenths of what the best cluster carries.
STEADY_RATES = {"LPLD": (8.0, 14.0), "LPHD": (1.5, 3.0), "HPLD": (4.0, 7.0), "HPHD": (1.5, 2.5), "Mixed": (3.0, 5.0)}
CONVERSATION_RATES = (1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Task:
    """One cluster at one point with one seed's requests."""

    point: str
    of: str  # the class of requests, or what else tells one place of a point from another
    setup: Setup
    seed: int
    requests: tuple[ChatRequest, ...]
    rate: float | None = None
    decode_only: bool = False


def burst(policies: list[str] | None, seeds: int) -> Iterator[Task]:
    """Figures 11 to 15: everything at once."""
    for of in CLASSES.values():
        for setup in chosen(burst_arms(), policies):
            for seed in range(seeds):
                yield Task("burst", of.name, setup, seed, tuple(class_requests(of, seed)))


def prefill(seeds: int) -> Iterator[Task]:
    """Figure 16: orders and batches without a predictor's load, and the coupled engine beside them."""
    plain = replace(tetriinfer("", 1, 1), taxed=False)
    setups = [coupled("coupled-16", 1, 16), replace(plain, name="fcfs", order=PrefillOrder.FCFS)]
    for order in (PrefillOrder.SJF, PrefillOrder.LJF):
        for batch in (16, 32, 64, 128):
            setups.append(replace(plain, name=f"{order.value}-{batch}", order=order, batch=batch))
    setups.append(replace(plain, name="srf", order=PrefillOrder.SRF))
    taxed = replace(plain, name="fcfs, predictor beside it", order=PrefillOrder.FCFS, taxed=True)
    for setup in (*setups, taxed):
        for seed in range(seeds):
            yield Task("prefill", "Mixed", setup, seed, tuple(class_requests(MIXED, seed)))


def dispatch(seeds: int) -> Iterator[Task]:
    """Figure 19: 32 heavy ones in all, 32 requests for each decode instance."""
    for instances in (2, 4, 8):
        for rule in RULES:
            setup = Setup(rule.value, decode=instances, dispatch=rule, granularity=129, accuracy=1.0)
            for seed in range(seeds):
                requests = dispatch_requests(instances, seed)
                yield Task("dispatch", f"{instances} instances", setup, seed, tuple(requests), decode_only=True)


def reserve(seeds: int) -> Iterator[Task]:
    """Figure 18: admission under memory pressure.

    Who is preempted is computed again, as vLLM does unless told otherwise, or swapped, as the paper calls it.
    """
    greedy = Setup("greedy", decode=1, past_tokens=50)
    setups = [greedy]
    for rule in (AdmissionRule.RESERVE_DYNAMIC, AdmissionRule.RESERVE_STATIC):
        for accuracy in (0.749, 1.0):
            setups.append(replace(greedy, name=f"{rule.value}, {accuracy:.1%}", admission=rule, accuracy=accuracy))
    longest = replace(greedy, name="greedy, longest leaves", accuracy=0.749, victim=VictimRule.LONGEST_REMAINING)
    oracles = [one for one in setups if one.accuracy in (None, 1.0)]
    swapping = [replace(one, name=one.name + SWAPPING, swap=V100_HOST) for one in oracles]
    for setup in (*setups, longest, *swapping):
        for seed in range(seeds):
            yield Task("reserve", "ShareGPT", setup, seed, tuple(class_requests(SHAREGPT, seed)), decode_only=True)


def steady(policies: list[str] | None, seeds: int, instances: int, quick: bool) -> Iterator[Task]:
    """The classes as Poisson processes, at rates for as many instances."""
    arms = chosen(steady_arms(instances), policies)
    for name, rates in STEADY_RATES.items():
        for rate in rates[:1] if quick else rates:
            at = rate * instances / STEADY_INSTANCES
            for setup in arms:
                for seed in range(seeds):
                    requests = class_requests(CLASSES[name], seed, 100 if quick else 400, at)
                    yield Task("steady", name, setup, seed, tuple(requests), at)
    for rate in CONVERSATION_RATES[:1] if quick else CONVERSATION_RATES:
        at = rate * instances / STEADY_INSTANCES
        for setup in arms:
            for seed in range(seeds):
                requests = turns(seed, 30 if quick else 150, at)
                yield Task("steady", "conversations", setup, seed, tuple(requests), at)


def flip(seeds: int) -> Iterator[Task]:
    """Four instances; long answers first, then long prompts: the roles that fit one do not fit the other."""
    even = tetriinfer("no flip", 2, 2)
    arms = {
        setup.name: setup
        for setup in (
            even,
            replace(even, name="idle flip", flips=IdleFlip),
            replace(even, name="queue flip", flips=QueueFlip),
        )
    } | {"fluid": fluid(4)}
    for setup in arms.values():
        for seed in range(seeds):
            yield Task("flip", "LPHD, then HPLD", setup, seed, tuple(turning(seed)))
