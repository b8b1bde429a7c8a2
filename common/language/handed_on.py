"""To whom an instance has handed sequences over: what is asked of it about them is for those."""

_MOST_REMEMBERED = 4096


class HandedOn:
    """The newest ``most`` of them. Who asks about an older one has heard of the other from its tokens long ago."""

    def __init__(self, most: int = _MOST_REMEMBERED) -> None:
        self._most = most
        self._to: dict[str, tuple[int, str]] = {}

    def note(self, request_id: str, epoch: int, instance: str) -> None:
        """It is being handed over to this instance; of one sequence, only the last time counts."""
        self._to.pop(request_id, None)
        self._to[request_id] = epoch, instance
        if len(self._to) > self._most:
            del self._to[next(iter(self._to))]

    def to(self, request_id: str, epoch: int) -> str:
        """Who was given this epoch; empty: nobody, or it is forgotten."""
        noted, instance = self._to.get(request_id, (0, ""))
        return instance if noted == epoch else ""

    def take(self, request_id: str, epoch: int) -> str:
        """Who was given an epoch up to this one, which is forgotten now; empty: nobody."""
        noted, instance = self._to.get(request_id, (0, ""))
        if not instance or noted > epoch:
            return ""
        del self._to[request_id]
        return instance
