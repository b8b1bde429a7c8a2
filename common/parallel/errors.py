"""What can go wrong between the members of a group."""

from collections.abc import Sequence


class GroupBroken(Exception):
    """A member died, hung, or left out of turn; the group is closed, and what was being computed in it is lost.

    members: of the group, in rank order; missing: those known not to have come (empty where that cannot be told).
    """

    def __init__(self, members: Sequence[str], reason: str, missing: Sequence[str] = ()) -> None:
        super().__init__(f"the group of {', '.join(members)} is broken: {reason}")
        self.members = tuple(members)
        self.missing = tuple(missing)
        self.reason = reason
