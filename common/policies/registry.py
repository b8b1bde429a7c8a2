"""Every scheduling policy by its name. The live scheduler and the simulator load policies only through here."""

from common.policies.fifo import Fifo
from common.policies.policy import Policy
from common.policies.rib import Rib

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Fifo,)}


class UnknownPolicy(ValueError):
    """No policy has this name."""


def policy_names() -> tuple[str, ...]:
    """The names there are; ``sdop:N`` takes any power of two and is listed with the paper's three."""
    return tuple(POLICIES)


def make_policy(name: str, first_epoch: int = 1, rib: Rib | None = None) -> Policy:
    """A fresh policy; ``rib`` is the profile it decides by (None: the paper's table).

    Raises:
        UnknownPolicy: names the ones there are.
    """
    try:
        return POLICIES[name](first_epoch)
    except KeyError:
        raise UnknownPolicy(f"no policy is called {name!r}; there are: {', '.join(sorted(POLICIES))}") from None
