"""The clusters that are compared, by the names they have on the command line and on the page."""

from dataclasses import replace

from common.policies.language.decode_admission import AdmissionRule
from common.policies.language.flip import IdleFlip, QueueFlip
from common.policies.language.prefill_schedule import PrefillOrder
from loadgen.simulator.language.link import ROCE
from loadgen.simulator.language.predictors import PAPER_ACCURACY
from loadgen.simulator.language.setups import Setup

# vLLM's coupled engine takes prompts whole, as many as its budget holds; heavy ones came in by 3 to 5 (figures 13, 14).
VLLM_BUDGET = 4096
_OURS = "fluid"


class UnknownArm(ValueError):
    """No cluster has this name."""


def coupled(name: str, instances: int, most_sequences: int = 256, chunk_tokens: int = VLLM_BUDGET) -> Setup:
    """Instances that do both phases, the least loaded first."""
    return Setup(name, fused=instances, chunk_tokens=chunk_tokens, most_sequences=most_sequences)


def tetriinfer(name: str, prefill: int, decode: int) -> Setup:
    """The paper's end-to-end setting (section 5.1)."""
    return Setup(
        name,
        prefill=prefill,
        decode=decode,
        order=PrefillOrder.SJF,
        batch=16,
        admission=AdmissionRule.RESERVE_DYNAMIC,
        accuracy=PAPER_ACCURACY[200],
        taxed=True,
        padded=True,
    )


def fluid(instances: int) -> Setup:
    """Ours: prediction without a trained model, prefixes, preemption between chunks, and roles by least delay.

    A sequence that has outlived its prediction is expected to have some more tokens; first tokens weigh so much that
    they come no later than at coupled engines; one prompt alone is not sliced.
    """
    return Setup(
        _OURS,
        fused=instances,
        order=PrefillOrder.SRF,
        ageing=100.0,
        admission=AdmissionRule.RESERVE_DYNAMIC,
        past_tokens=50,
        histogram=True,
        fluid=True,
        first_token_weight=6.0,
        alone_tokens=VLLM_BUDGET,
    )


def burst_arms() -> dict[str, Setup]:
    """What meets the paper's bursts: its baseline, also on as many cards as TetriInfer has, TetriInfer, and ours."""
    paper = tetriinfer("tetriinfer", 1, 1)
    return _by_name(
        coupled("coupled-16", 1, 16),
        coupled("coupled", 1),
        coupled("coupled-16x2", 2, 16),
        coupled("coupled-x2", 2),
        coupled("coupled-chunked-x2", 2, chunk_tokens=512),
        paper,
        replace(paper, name="tetriinfer-roce", link=ROCE),
        replace(paper, name="tetriinfer-fcfs", order=PrefillOrder.FCFS),
        replace(paper, name="tetriinfer-greedy", admission=AdmissionRule.GREEDY),
        replace(paper, name="tetriinfer-g100", granularity=100, accuracy=PAPER_ACCURACY[100]),
        replace(paper, name="tetriinfer-g400", granularity=400, accuracy=PAPER_ACCURACY[400]),
        replace(paper, name="tetriinfer-oracle", accuracy=1.0),
        replace(paper, name="tetriinfer-histogram", accuracy=None, histogram=True, taxed=False),
        fluid(2),
    )


def steady_arms(instances: int) -> dict[str, Setup]:
    """What meets requests that keep coming, all with as many instances.

    Raises:
        UnknownArm: there are too few to have two of each role.
    """
    if instances < 4:
        raise UnknownArm(f"{instances} instances: TetriInfer's roles and flips need 4 or more")
    quarter, half = instances // 4, instances // 2
    splits = sorted({quarter, (quarter + half + 1) // 2, half})
    even = tetriinfer(f"tetriinfer-{half}p", half, instances - half)
    return _by_name(
        coupled("coupled-16", instances, 16),
        coupled("coupled", instances),
        coupled("coupled-chunked", instances, chunk_tokens=512),
        *(tetriinfer(f"tetriinfer-{prefill}p", prefill, instances - prefill) for prefill in splits),
        replace(even, name=f"{even.name}-idle-flip", flips=IdleFlip),
        replace(even, name=f"{even.name}-queue-flip", flips=QueueFlip),
        fluid(instances),
    )


def check(names: list[str] | None, arms: dict[str, Setup]) -> None:
    """Whether there are clusters of these names.

    Raises:
        UnknownArm: says which there are.
    """
    for name in names or ():
        if name not in arms:
            raise UnknownArm(f"no cluster is called {name!r}; there are: {', '.join(arms)}")


def chosen(arms: dict[str, Setup], names: list[str] | None) -> list[Setup]:
    """Those of these names that are among them; None: all."""
    return [setup for name, setup in arms.items() if names is None or name in names]


def _by_name(*setups: Setup) -> dict[str, Setup]:
    return {setup.name: setup for setup in setups}
