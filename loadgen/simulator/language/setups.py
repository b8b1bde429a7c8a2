"""What is compared: clusters by name, and how one is put together."""

from collections.abc import Callable
from dataclasses import dataclass

from common.messages.cluster import LanguageRole
from common.policies.language.batching_rules import BatchingRules
from common.policies.language.continuous_batching import ContinuousBatching
from common.policies.language.decode_admission import AdmissionRule, DecodeAdmission, VictimRule
from common.policies.language.decode_dispatch import DecodeDispatch, DelayCost, DispatchRule, RatioMode
from common.policies.language.flip import FlipPolicy
from common.policies.language.least_delay import LeastDelay
from common.policies.language.length_prediction import LengthBuckets
from common.policies.language.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.language.prefill_schedule import PrefillOrder
from common.policies.language.routing import Costs
from loadgen.arrivals import generator
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.cluster import FUSED, Cluster
from loadgen.simulator.language.control import ControlPlane
from loadgen.simulator.language.cost import OPT_13B_2_V100, Machine, StepWork
from loadgen.simulator.language.history import Histories
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.link import NVLINK, HostLink, LinkKind, Network
from loadgen.simulator.language.predictors import Histogram, NoisyOracle, Oracle, Predictor, PredictorTax
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.router import FluidRoles, LeastLoad, Router

_DRAWS = 21
CHUNK_TOKENS = 512  # where prefill saturates OPT-13B on two V100s (TetriInfer, section 3.3.3)
# In host memory, 128 GB at OPT-13B's size; nothing is shared in the paper's own workloads.
HISTORY_TOKENS = 160_000
# A chunk of 512 takes 144 ms by figure 2; the steps in figures 11 to 16 are 150 to 155 ms apart.
CHUNK_OVERHEAD_S = 0.008


@dataclass(frozen=True, slots=True)
class Setup:
    """One cluster and its policies.

    Attributes:
        fused, prefill, decode: how many instances of each kind.
        chunk_tokens, most_sequences, alone_tokens, fixed: see ``ContinuousBatching``.
        order, batch, ageing, merges_batches: see ``PrefillSchedule``.
        admission, victim, past_tokens: see ``DecodeAdmission``.
        dispatch, ratio_mode, counts_pending: see ``DecodeDispatch``.
        granularity, accuracy: of the predictor; accuracy 1.0 is an oracle, None nobody.
        histogram: the predictor is the running histogram.
        taxed: whether the predictor shares the prefill instance's accelerator.
        padded: whether a chunk that is not full costs what a full one does.
        chunk_overhead_s: what a chunk costs beside its pass.
        swap: see ``Instance``.
        fluid: whether roles are what ``LeastDelay`` makes of them; all instances are fused then.
        first_token_weight: see ``LeastDelay``.
        flips: makes the policy; None: roles stay what they are.
    """

    name: str
    fused: int = 0
    prefill: int = 0
    decode: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    most_sequences: int = 256
    alone_tokens: int = 0
    fixed: bool = False
    order: PrefillOrder = PrefillOrder.FCFS
    batch: int = 16
    ageing: float = 0.0
    merges_batches: bool = True
    admission: AdmissionRule = AdmissionRule.GREEDY
    victim: VictimRule = VictimRule.LATEST
    past_tokens: int = 1
    dispatch: DispatchRule = DispatchRule.POWER_OF_TWO
    ratio_mode: RatioMode = RatioMode.BY_KIND
    counts_pending: bool = True
    granularity: int = 200
    accuracy: float | None = None
    histogram: bool = False
    taxed: bool = False
    padded: bool = False
    chunk_overhead_s: float = CHUNK_OVERHEAD_S
    link: LinkKind = NVLINK
    swap: HostLink | None = None
    fluid: bool = False
    first_token_weight: float = 1.0
    flips: Callable[[], FlipPolicy] | None = None

    @property
    def instances(self) -> int:
        return self.fused + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Built:
    """A cluster that is ready to run, and its network."""

    cluster: Cluster
    network: Network


def build(
    setup: Setup,
    requests: list[ChatRequest],
    seed: int,
    machine: Machine = OPT_13B_2_V100,
    router: Router | None = None,
) -> Built:
    """A fresh cluster for these requests."""
    clock = Clock()
    network = Network(clock, setup.link)
    predictor = predictor_of(setup, requests, seed)
    names = [f"language-{number}" for number in range(setup.instances)]
    taxes = {name: PredictorTax() for name in names} if setup.taxed else {}
    router = router or (_fluid(clock, setup, machine, network) if setup.fluid else LeastLoad(clock))
    histories = Histories(HISTORY_TOKENS // machine.block_tokens, machine.block_tokens)
    cluster = Cluster(clock, router, network, predictor, taxes, setup.fluid, histories)
    if setup.prefill:
        cluster.control = ControlPlane(
            clock,
            router,
            lambda: DecodeDispatch(
                setup.dispatch,
                counts_pending=setup.counts_pending,
                ratio_mode=setup.ratio_mode,
                delay=delay_cost(machine),
            ),
            cluster.chosen,
            generator(seed, _DRAWS),
            setup.flips() if setup.flips is not None else None,
            histories,
        )
    roles: list[tuple[LanguageRole, ...]] = [
        *[FUSED] * setup.fused,
        *[(LanguageRole.PREFILL,)] * setup.prefill,
        *[(LanguageRole.DECODE,)] * setup.decode,
    ]
    for name, of_one in zip(names, roles, strict=True):
        tax = taxes.get(name)
        padded_to = setup.chunk_tokens if setup.padded else 0
        slowed = tax.slowed if tax is not None else None
        instance = Instance(
            name,
            clock,
            machine,
            batching(setup, machine),
            cluster,
            padded_to,
            setup.chunk_overhead_s,
            slowed,
            setup.swap,
        )
        cluster.add(instance, of_one)
    return Built(cluster, network)


def batching(setup: Setup, machine: Machine) -> ContinuousBatching:
    """The policies inside an instance."""
    rules = BatchingRules(
        alone_tokens=setup.alone_tokens,
        order=setup.order,
        batch=setup.batch,
        ageing=setup.ageing,
        merges_batches=setup.merges_batches,
        admission=DecodeAdmission(setup.admission, setup.victim, setup.past_tokens),
        fixed=setup.fixed,
    )
    return rules.batching(machine.blocks, machine.block_tokens, setup.chunk_tokens, setup.most_sequences)


def predictor_of(setup: Setup, requests: list[ChatRequest], seed: int) -> Predictor | None:
    """Who predicts there; ``None``: nobody."""
    buckets = LengthBuckets(setup.granularity, -(-2200 // setup.granularity))
    if setup.histogram:
        return Histogram(buckets)
    if setup.accuracy is None:
        return None
    if setup.accuracy == 1.0:
        return Oracle(buckets)
    noisy = NoisyOracle(buckets, setup.accuracy, seed)
    noisy.prepare([request.name for request in requests])
    return noisy


def _fluid(clock: Clock, setup: Setup, machine: Machine, network: Network) -> FluidRoles:
    """With what the router believes that time goes into: measured where a profile is, here asked of the cost model."""
    step_s = machine.cost.step_s
    floor_s = step_s(StepWork(0, 0, 0, 0))
    decode = DecodeCost(
        floor_s=floor_s,
        sequence_s=step_s(StepWork(0, 0, 1, 0)) - floor_s,
        context_token_s=(step_s(StepWork(0, 0, 0, 1000)) - floor_s) / 1000,
    )
    chunk_s = step_s(StepWork(setup.chunk_tokens, 0, 0, 0))
    # In tokens, not bytes.
    link = LinkCost(1 / network.estimate_s(machine.kv_token_bytes, 0), 0.0)
    costs = Costs(RateCost(setup.chunk_tokens / chunk_s), decode, link, 1, 1, setup.chunk_tokens)
    return FluidRoles(clock, LeastDelay(setup.first_token_weight), costs, machine.kv_tokens)


def delay_cost(machine: Machine, heavy_context: int = 260) -> DelayCost:
    """What ``LEAST_DELAY`` reckons with; a heavy sequence reads so many tokens more than a light one."""
    step_s = machine.cost.step_s
    floor_s = step_s(StepWork(0, 0, 0, 0))
    return DelayCost(
        sequence_ms=1000 * (step_s(StepWork(0, 0, 1, 0)) - floor_s),
        heavy_ms=1000 * (step_s(StepWork(0, 0, 0, heavy_context)) - floor_s),
        transfer_token_ms=1000 * machine.kv_token_bytes / NVLINK.bytes_per_s,
    )
