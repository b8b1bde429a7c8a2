"""What keys and values travel over: bandwidth, a cost for every message, and fair sharing of every end.

Every instance has one port, in and out apart. A transfer goes at the smaller of its shares of the sender's way out and
of the receiver's way in; shares are equal. Rates change whenever a transfer begins or ends.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from loadgen.simulator.language.clock import Clock


@dataclass(frozen=True, slots=True)
class LinkKind:
    """One kind of link. ``shared`` False: every transfer has all the bandwidth, as TetriInfer emulated it."""

    name: str
    bytes_per_s: float
    message_s: float
    shared: bool = True


# TetriInfer's two emulated links (section 4). What a message costs is ours: the paper counts none.
ROCE = LinkKind("RoCE, 200 Gb/s", 25e9, 10e-6)
NVLINK = LinkKind("NVLink, 300 GB/s", 300e9, 10e-6)


@dataclass(frozen=True, slots=True)
class HostLink:
    """Between an instance's cards and its host's memory. Every card moves its share of a block, all at once.

    Attributes:
        bytes_per_s: of each card.
        copies: how many each card makes of one block.
        copy_s: what every copy costs beside its bytes.
    """

    cards: int
    bytes_per_s: float
    copies: int
    copy_s: float

    def seconds(self, blocks: int, block_bytes: int) -> float:
        """How long so many blocks take, in or out; ``block_bytes`` are of all cards."""
        return blocks * (self.copies * self.copy_s + block_bytes / self.cards / self.bytes_per_s)


# Two V100s on PCI Express 3.0 with 16 lanes: 15.8 GB/s by its specification, of which large copies get some 12. vLLM
# moves each layer's keys and each layer's values of each block by a call of their own. On an A100 that moved 3.11 GB/s,
# 1250 blocks at a time (its pull request 11531): 10.5 us a copy, if one was 32 KB (which model it was is not said), and
# 9.2 without its bytes at PCI Express 4.0's 25 GB/s. On an H20 a call was found to cost 2.3 us (FlexKV's pull request
# 193). The dearer counts here: hosts of V100s were older than either.
V100_HOST = HostLink(cards=2, bytes_per_s=12e9, copies=2 * 40, copy_s=9.2e-6)


@dataclass(slots=True)
class _Transfer:
    source: str
    target: str
    left_bytes: float
    arrived: Callable[[], None]
    rate: float = 0.0


class Network:
    """The links of a cluster."""

    def __init__(self, clock: Clock, kind: LinkKind) -> None:
        self._clock = clock
        self._kind = kind
        self._transfers: list[_Transfer] = []
        self._counted_s = 0.0
        self._version = 0
        self.sent_bytes = 0
        self.messages = 0

    def send(self, source: str, target: str, size_bytes: int, messages: int, arrived: Callable[[], None]) -> None:
        """Have so many bytes carried in so many messages; ``arrived`` is called when the last one is there."""
        self.sent_bytes += size_bytes
        self.messages += messages
        wait_s = messages * self._kind.message_s
        if not self._kind.shared:
            self._clock.after(wait_s + size_bytes / self._kind.bytes_per_s, arrived)
            return
        transfer = _Transfer(source, target, float(size_bytes), arrived)
        self._clock.after(wait_s, lambda: self._begin(transfer))

    def estimate_s(self, size_bytes: int, messages: int) -> float:
        """What it takes on links that nobody else uses."""
        return messages * self._kind.message_s + size_bytes / self._kind.bytes_per_s

    def _begin(self, transfer: _Transfer) -> None:
        self._progress()
        self._transfers.append(transfer)
        self._share()

    def _progress(self) -> None:
        elapsed_s = self._clock.now_s - self._counted_s
        self._counted_s = self._clock.now_s
        for transfer in self._transfers:
            transfer.left_bytes -= elapsed_s * transfer.rate

    def _share(self) -> None:
        """Rates for what is under way, and the moment at which the next is there."""
        self._version += 1
        if not self._transfers:
            return
        out = Counter(transfer.source for transfer in self._transfers)
        into = Counter(transfer.target for transfer in self._transfers)
        for transfer in self._transfers:
            transfer.rate = self._kind.bytes_per_s / max(out[transfer.source], into[transfer.target])
        next_s = min(max(0.0, transfer.left_bytes) / transfer.rate for transfer in self._transfers)
        version = self._version
        self._clock.after(next_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return  # others have come in between, and with them another moment
        self._progress()
        # A byte is nothing, and sums of floating-point numbers rarely end at zero.
        done = [transfer for transfer in self._transfers if transfer.left_bytes < 1]
        self._transfers = [transfer for transfer in self._transfers if transfer.left_bytes >= 1]
        self._share()
        for transfer in done:
            transfer.arrived()
