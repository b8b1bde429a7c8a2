"""Decode instances alone, with every prompt's keys and values there at the start (TetriInfer, section 5.2.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.policies.language.decode_dispatch import (
    DecodeDispatch,
    DecodeLoad,
    DispatchRule,
    LoadsBroadcast,
    SequenceBegan,
)
from loadgen.arrivals import generator
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.cost import OPT_13B_2_V100, Machine
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.requests import ChatRequest, Progress
from loadgen.simulator.language.setups import Setup, batching, delay_cost, predictor_of

_DRAWS = 22


@dataclass(slots=True)
class DecodeOnly:
    """The instances' ``Watcher``, and what came of the run.

    Attributes:
        heavy_light: how many heavy and light ones every instance got.
    """

    clock: Clock = field(default_factory=Clock)
    progress: dict[str, Progress] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    heavy_light: dict[str, tuple[int, int]] = field(default_factory=dict)

    def began(self, request: ChatRequest, instance: Instance) -> None: ...

    def prefilled(self, request: ChatRequest, instance: Instance) -> None: ...

    def preempted(self, request: ChatRequest, instance: Instance) -> None:
        self.progress[request.name].preempted += 1

    def ended(self, request: ChatRequest, instance: Instance) -> None:
        progress = self.progress[request.name]
        progress.end_s = self.clock.now_s
        progress.decoded_by = instance.name


def decode_all(
    setup: Setup, requests: Sequence[ChatRequest], seed: int, machine: Machine = OPT_13B_2_V100
) -> DecodeOnly:
    """All of them at once on ``setup.decode`` instances, sent there by the setup's rule of dispatch."""
    run = DecodeOnly()
    decoding = [request for request in requests if request.answer_tokens > 1]
    predictor = predictor_of(setup, list(requests), seed)
    for number in range(setup.decode):
        name = f"decode-{number}"
        run.instances[name] = Instance(name, run.clock, machine, batching(setup, machine), run, swap=setup.swap)
    targets = _targets(setup, decoding, run, seed, machine) if setup.decode > 1 else {}
    for request in decoding:
        run.progress[request.name] = Progress(request, first_token_s=0.0)
        expected = request.prompt_tokens + predictor.predict(request).low if predictor is not None else 0
        run.instances[targets.get(request.name, "decode-0")].decode(request, expected)
    run.clock.run()
    return run


def _targets(
    setup: Setup, requests: Sequence[ChatRequest], run: DecodeOnly, seed: int, machine: Machine
) -> Mapping[str, str]:
    """Whom one dispatcher sends where that has heard of empty instances."""
    dispatch = DecodeDispatch(setup.dispatch, ratio_mode=setup.ratio_mode, holds=False, delay=delay_cost(machine))
    empty = [DecodeLoad(one.name, one.free_blocks, 0, 0) for one in run.instances.values()]
    dispatch.handle(LoadsBroadcast(tuple(empty)))
    predictor = predictor_of(setup, list(requests), seed)
    if predictor is None:
        raise ValueError("a dispatcher needs a prediction")
    draws = generator(seed, _DRAWS)
    targets: dict[str, str] = {}
    for request in requests:
        first, second = draws.random(2).tolist()
        predicted = predictor.predict(request)
        began = SequenceBegan(request.name, request.prompt_tokens, predicted, (first, second))
        (choice,) = dispatch.handle(began)
        targets[request.name] = choice.instance
        heavy, light = run.heavy_light.get(choice.instance, (0, 0))
        is_heavy = predicted.low > 128
        run.heavy_light[choice.instance] = (heavy + is_heavy, light + (not is_heavy))
    return targets


RULES = (DispatchRule.IMBALANCE, DispatchRule.RANDOM, DispatchRule.POWER_OF_TWO, DispatchRule.LEAST_DELAY)
