"""Where groups meet: a small key-value store that every process holds open, found by the address in a lease."""

import socket
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from common.parallel.errors import GroupBroken
from common.parallel.transport import Connector, Transport


class MeetingPlaces:
    """This process's own store, and connections to those of others, of which the last used `keep` are kept."""

    def __init__(self, host: str, timeout_s: float, keep: int) -> None:
        """host: the address at which the others reach this process; nothing listens on any other."""
        self._timeout_s = timeout_s
        self._keep = keep
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._own = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._held_here: list[str] = []
        self._others: OrderedDict[str, TCPStore] = OrderedDict()

    def meet(self, address: str, name: str, members: Sequence[str], rank: int, connector: Connector) -> Transport:
        """Connect with the others at the store at `address`. `name` is used by no other meeting there.

        Raises:
            GroupBroken: the store is gone, or somebody did not come within the time.
        """
        if address == self.address:
            self._held_here.append(name)
        transport, reason, missing = self._attempt(address, name, members, rank, connector)
        if transport is None:
            # The connection may be what failed; a new one costs a millisecond or two.
            self._others.pop(address, None)
            raise GroupBroken(members, reason, missing)
        return transport

    def clear(self) -> None:
        """Forget the meetings that were held here, after one to which all came.

        What is left of a failed one stays until then: it tells those who still wait who is missing.
        """
        if not self._held_here:
            return
        over = tuple(f"{name}/" for name in self._held_here)
        self._held_here.clear()
        for key in self._own.list_keys():
            if key.startswith(over):
                self._own.delete_key(key)

    def _attempt(
        self, address: str, name: str, members: Sequence[str], rank: int, connector: Connector
    ) -> tuple[Transport | None, str, list[str]]:
        try:
            store = PrefixStore(name, self._store(address))
        except RuntimeError as error:
            return None, f"no meeting place at {address} ({_first_line(error)})", []
        try:
            store.set(f"here/{rank}", "1")
            store.wait([f"here/{other}" for other in range(len(members))], timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            missing = _missing(store, members)
            who = f"{', '.join(missing)} did not come within {self._timeout_s:g} s" if missing else _first_line(error)
            return None, who, missing
        try:
            return connector.connect(store, rank, len(members), self._timeout_s), "", []
        except RuntimeError as error:
            return None, _first_line(error), []

    def _store(self, address: str) -> TCPStore:
        if address == self.address:
            return self._own
        store = self._others.get(address)
        if store is None:
            host, _, port = address.rpartition(":")
            store = TCPStore(
                host, int(port), is_master=False, timeout=timedelta(seconds=self._timeout_s), wait_for_workers=False
            )
            self._others[address] = store
            if len(self._others) > self._keep:
                self._others.popitem(last=False)
        self._others.move_to_end(address)
        return store


def _missing(store: Store, members: Sequence[str]) -> list[str]:
    """Who has not come, as far as the store can still say."""
    try:
        return [member for rank, member in enumerate(members) if not store.check([f"here/{rank}"])]
    except RuntimeError:
        return []


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
