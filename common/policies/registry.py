"""Every scheduling policy by its name. The live scheduler and the simulator load policies only through here."""

from common.policies.fifo import Fifo
from common.policies.policy import Policy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Fifo,)}


class UnknownPolicy(ValueError):
    """No policy has this name."""


def make_policy(name: str, first_epoch: int = 1) -> Policy:
    """A fresh policy.

    Raises:
        UnknownPolicy: names the ones there are.
    """
    try:
        return POLICIES[name](first_epoch)
    except KeyError:
        raise UnknownPolicy(f"no policy is called {name!r}; there are: {', '.join(sorted(POLICIES))}") from None
