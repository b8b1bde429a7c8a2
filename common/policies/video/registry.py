"""Every scheduling policy by its name. The live scheduler and the simulator load policies only through here."""

from collections.abc import Callable

from common.policies.video.ddit import Ddit, DditNoDecoupling, DditNoPromotion, DditWaitingFirst, DynamicPartition
from common.policies.video.elastic import Elastic
from common.policies.video.fifo import Fifo
from common.policies.video.policy import Policy
from common.policies.video.preemptive import EarliestDeadlineFirst, ShortestRemainingTimeFirst
from common.policies.video.rib import Rib
from common.policies.video.static_groups import OptimalPartition, StaticDegree, StaticPartition

POLICIES: dict[str, Callable[[int, Rib | None], Policy]] = {
    policy.name: policy
    for policy in (
        Fifo,
        StaticPartition,
        OptimalPartition,
        DynamicPartition,
        Ddit,
        DditNoPromotion,
        DditNoDecoupling,
        DditWaitingFirst,
        ShortestRemainingTimeFirst,
        EarliestDeadlineFirst,
        Elastic,
    )
}

_STATIC = "sdop:"
_LISTED_DEGREES = (1, 2, 4)


class UnknownPolicy(ValueError):
    """No policy has this name."""


def policy_names() -> tuple[str, ...]:
    """The names there are; ``sdop:N`` takes any power of two and is listed with the paper's three."""
    return (*POLICIES, *(f"{_STATIC}{degree}" for degree in _LISTED_DEGREES))


def make_policy(name: str, first_epoch: int = 1, rib: Rib | None = None) -> Policy:
    """A fresh policy; ``rib`` is the profile it decides by (None: the paper's table).

    Raises:
        UnknownPolicy: names the ones there are.
    """
    if name.startswith(_STATIC) and (degree := name.removeprefix(_STATIC)).isdecimal():
        size = int(degree)
        if size > 0 and size & (size - 1) == 0:
            return StaticDegree(size, first_epoch, rib)
    make = POLICIES.get(name)
    if make is None:
        raise UnknownPolicy(f"no policy is called {name!r}; there are: {', '.join(sorted(policy_names()))}")
    return make(first_epoch, rib)
