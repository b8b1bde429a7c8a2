"""Tensors shared out over a group of processes: who has how much of an axis, and how the shared axis is changed."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Peers(Protocol):
    """What is needed of the group that runs one forward together; `common.parallel.Group` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send piece i to rank i; returns what each rank sent here, by rank, in `shapes`."""

    def all_gather(self, piece: Tensor) -> list[Tensor]:
        """Every rank's piece, by rank. All have one shape."""


class Team:
    """`size` ranks of a group from `first` on, as a group of their own.

    They use the whole group's connections, so all teams of a group make the same exchanges at the same time: each
    sends nothing to the others. Against a group of its own for each team, that saves forming and keeping them.
    """

    def __init__(self, peers: Peers, first: int, size: int) -> None:
        self._peers = peers
        self._first = first
        self.rank = peers.rank - first
        self.size = size

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        before, after = self._first, self._peers.size - self._first - self.size
        nothing = pieces[0].new_empty(0)
        received = self._peers.all_to_all(
            [nothing] * before + list(pieces) + [nothing] * after, [(0,)] * before + list(shapes) + [(0,)] * after
        )
        return received[before : before + self.size]

    def all_gather(self, piece: Tensor) -> list[Tensor]:
        return self.all_to_all([piece] * self.size, [piece.shape] * self.size)


def shares(count: int, parts: int) -> list[int]:
    """How many of `count` each of `parts` ranks gets: as even as whole numbers allow, larger shares first."""
    return [count // parts + (rank < count % parts) for rank in range(parts)]


def own_range(amounts: Sequence[int], rank: int) -> slice:
    """The part of the whole axis that is rank's share."""
    start = sum(amounts[:rank])
    return slice(start, start + amounts[rank])


def reshard(x: Tensor, peers: Peers, split: int, split_shares: list[int], join: int, join_shares: list[int]) -> Tensor:
    """Change the shared axis with one all-to-all.

    x holds all of axis `split` and this rank's share of axis `join`; the result holds this rank's share of `split`
    and all of `join`. Counts that do not divide make unequal shares, so there is nothing to pad or crop.
    """
    if peers.size == 1:
        return x
    pieces = torch.split(x, split_shares, dim=split)
    shapes = []
    for amount in join_shares:
        shape = list(x.shape)
        shape[split], shape[join] = split_shares[peers.rank], amount
        shapes.append(shape)
    return torch.cat(peers.all_to_all(pieces, shapes), dim=join)


def gather_padded(piece: Tensor, peers: Peers, axis: int, amounts: list[int]) -> list[Tensor]:
    """Every rank's piece [.., amounts[rank] at `axis`, ..]: padded to the largest, gathered, cropped."""
    missing = max(amounts) - piece.shape[axis]
    if missing:
        padding = [0, 0] * (piece.dim() - 1 - axis) + [0, missing]
        piece = F.pad(piece, padding)
    gathered = peers.all_gather(piece)
    return [whole.narrow(axis, 0, amount) for whole, amount in zip(gathered, amounts, strict=True)]
