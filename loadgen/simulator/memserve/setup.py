"""What a simulated cluster is made of, and what its scheduler sees of it."""

from dataclasses import dataclass, field

from common.policies.language.prefill_cost import PrefillCost
from common.policies.language.routing import Costs
from common.policies.language.sites import InstanceKind
from loadgen.simulator.memserve.machine import Caching, Machine, Transfers, costs_of


@dataclass(frozen=True, slots=True)
class View:
    """How the scheduler comes to know what instances have.

    Attributes:
        publishes: instances tell it. False: as in the paper, it remembers what answers pass by, and forgets by age.
        delay_s: what is told is behind by so much.
        lost: the share of changes that do not come; the next one shows it, and a snapshot repairs it.
        expects: what is routed counts as cached where it was sent.
        cost_noise: predicted times are off by up to this share (paper: 5 % on average, so 0.1).
    """

    publishes: bool = True
    delay_s: float = 0.01
    lost: float = 0.0
    ttl_s: float = 300.0
    expects: bool = True
    cost_noise: float = 0.1


@dataclass(frozen=True, slots=True)
class Setup:
    """A cluster: which instances, how they cache and send, who routes and what it sees."""

    kinds: tuple[InstanceKind, ...]
    machine: Machine
    caching: Caching = Caching.C3
    transfers: Transfers = field(default_factory=Transfers)
    view: View = field(default_factory=View)


@dataclass(frozen=True, slots=True)
class _NoisyCost:
    """A prediction that is wrong by up to ``spread``, always in the same way for the same prompt."""

    exact: PrefillCost
    extra_s: float
    spread: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        wrong = ((prompt_tokens * 2_654_435_761 + cached_tokens * 40_503) % 65_536) / 32_768 - 1
        return (self.exact.exec_s(prompt_tokens, cached_tokens) + self.extra_s) * (1 + self.spread * wrong)


def seen_costs(setup: Setup) -> Costs:
    """What the scheduler takes the machines for."""
    exact = costs_of(setup.machine, setup.transfers)
    noisy = _NoisyCost(exact.prefill, setup.machine.pass_extra_s, setup.view.cost_noise)
    return Costs(noisy, exact.decode, exact.link, exact.kv_token_bytes, exact.block_tokens)
