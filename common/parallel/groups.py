"""The keeper of a process's groups: made on demand, kept, reused, dropped when a member dies (for DDiT).

What is kept may differ from process to process: each drops by its own count and by what it heard of. Where one has
dropped a group that the others still hold, they notice when they enter it, and all form it anew. That costs the price
of a new group once, and nothing has to be agreed on beforehand.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from common.parallel.errors import GroupBroken
from common.parallel.group import Group
from common.parallel.meeting import MeetingPlaces
from common.parallel.transport import BackendName, connector


class Groups:
    """Synchronous: its methods, and those of the groups, are called on the compute thread alone.

    address: of this process's meeting place ("host:port"), at which groups that it leads meet.
    """

    def __init__(
        self,
        me: str,
        host: str = "127.0.0.1",
        *,
        backend: BackendName = "gloo",
        device: torch.device | None = None,
        exchange_timeout_s: float = 20.0,
        meeting_timeout_s: float = 5.0,
        keep: int = 16,
    ) -> None:
        """host: the address at which other members reach this process. keep: groups held open at most."""
        if keep < 1:
            raise ValueError(f"at least one group must be kept, got {keep}")
        self._me = me
        self._connector = connector(backend, host, device or torch.device("cpu"))
        self._places = MeetingPlaces(host, meeting_timeout_s, keep)
        self._exchange_timeout_s = exchange_timeout_s
        self._meeting_timeout_s = meeting_timeout_s
        self._keep = keep
        self._kept: OrderedDict[tuple[str, ...], Group] = OrderedDict()
        self.address = self._places.address

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """The member sets whose groups are open, the one longest unused first."""
        return [members for members, group in self._kept.items() if not group.closed]

    def enter(self, members: Sequence[str], address: str, token: int) -> Group:
        """The group of these members, in rank order, once all of them have entered it.

        A kept group costs a look-up and one exchange of a number between all; a new one a meeting at `address`,
        the leader's. `token` is the same for all members and greater for every entry of a member set (the lease's
        epoch).

        Raises:
            GroupBroken: somebody did not come, or came with another token. Entering again takes a new token.
            ValueError: this process is not among the members, or somebody is there twice.
        """
        wanted = tuple(members)
        if self._me not in wanted or len(set(wanted)) != len(wanted):
            raise ValueError(f"{self._me} cannot enter a group of {', '.join(wanted)}")
        if len(wanted) == 1:
            return Group(wanted, 0, None, self._connector, self._exchange_timeout_s)
        group = self._kept.get(wanted)
        if group is not None:
            self._kept.move_to_end(wanted)
            if self._all_entered(group, token):
                return group
            del self._kept[wanted]
        group = self._form(wanted, address, token)
        self._kept[wanted] = group
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)[1].close()
        return group

    def forget(self, member: str) -> None:
        """Close every group that a dead member was in."""
        for members in [members for members in self._kept if member in members]:
            self._kept.pop(members).close()

    def close(self) -> None:
        """Close every group."""
        while self._kept:
            self._kept.popitem()[1].close()

    def _all_entered(self, group: Group, token: int) -> bool:
        """Whether all members are in the kept group; not, where one has closed it."""
        try:
            self._check(group, token)
        except _OtherToken:
            raise
        except GroupBroken:
            return False
        return True

    def _form(self, members: tuple[str, ...], address: str, token: int) -> Group:
        name = f"{token}/{','.join(members)}"
        rank = members.index(self._me)
        transport = self._places.meet(address, name, members, rank, self._connector)
        group = Group(members, rank, transport, self._connector, self._exchange_timeout_s)
        del transport  # a group that breaks must hold the last reference
        self._check(group, token)
        self._places.clear()
        return group

    def _check(self, group: Group, token: int) -> None:
        """Wait until all are there. Raises GroupBroken."""
        tokens = group.compare(token, self._meeting_timeout_s)
        if any(other != token for other in tokens):
            group.close()
            raise _OtherToken(group.members, f"its members came with different tokens {tokens}")


class _OtherToken(GroupBroken):
    """Not to be healed by meeting again: the members mean different things."""
