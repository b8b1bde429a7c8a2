"""The paper's offline lower bound (DDiT, algorithm 1): the cheapest fixed partition of the GPUs, the mix being known.

A dynamic programme gives every class of requests one contiguous block of GPUs and one degree of parallelism, so that
the summed occupied time of all GPUs is least. Departure: the reported online formula for several groups halves the
service time together with the waiting; the usual approximation halves the waiting alone. Both are here (``Halving``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

OccupiedTime = Callable[[int, int, int], float]
"""Seconds that each GPU of a block is occupied, from the class, the degree and the number of groups in the block."""


class Halving(StrEnum):
    """What of M/M/c is halved to approximate M/D/c."""

    REPORTED = "reported"  # the whole sojourn, as the paper's account has it: falls below the service time
    USUAL = "usual"  # the waiting only


@dataclass(frozen=True, slots=True)
class Block:
    """GPUs ``first`` to ``first + gpus - 1`` serve one class in ``groups`` groups of ``degree``."""

    first: int
    gpus: int
    degree: int
    groups: int
    occupied_s: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The least summed occupied time, in GPU-seconds, and one partition that reaches it, class by class."""

    gpu_seconds: float
    blocks: tuple[Block, ...]


def groups(first: int, gpus: int, degree: int, server_size: int) -> int:
    """How many groups of ``degree`` GPUs the block holds, none of them crossing a server."""
    found, at, end = 0, first, first + gpus
    while at < end:
        edge = min(end, (at // server_size + 1) * server_size)
        found += (edge - at) // degree
        at = edge
    return found


def lower_bound(gpus: int, classes: int, degrees: Sequence[int], server_size: int, occupied: OccupiedTime) -> Bound:
    """Algorithm 1. GPUs in front of the first block may stay unused, as in the paper's dp[i][0] = 0.

    Raises:
        ValueError: no partition serves every class (too few GPUs, or a load that no partition carries).
    """
    best = [[math.inf] * (classes + 1) for _ in range(gpus + 1)]
    chosen: dict[tuple[int, int], Block] = {}
    for end in range(gpus + 1):
        best[end][0] = 0.0
    known: dict[tuple[int, int, int], float] = {}
    for end in range(1, gpus + 1):
        for number in range(1, classes + 1):
            for size in range(1, end + 1):
                before = best[end - size][number - 1]
                if before >= best[end][number]:
                    continue
                for degree in degrees:
                    count = groups(end - size, size, degree, server_size)
                    if count == 0:
                        continue
                    key = (number - 1, degree, count)
                    if key not in known:
                        known[key] = occupied(*key)
                    cost = before + size * known[key]
                    if cost < best[end][number]:
                        best[end][number] = cost
                        chosen[end, number] = Block(end - size, size, degree, count, known[key])
    if math.isinf(best[gpus][classes]):
        raise ValueError(f"no partition of {gpus} GPUs serves all {classes} classes")
    return Bound(best[gpus][classes], _blocks(chosen, gpus, classes))


def _blocks(chosen: dict[tuple[int, int], Block], gpus: int, classes: int) -> tuple[Block, ...]:
    blocks: list[Block] = []
    end = gpus
    for number in range(classes, 0, -1):
        block = chosen[end, number]
        blocks.append(block)
        end = block.first
    return tuple(reversed(blocks))


def batch_time(requests: float, shares: Sequence[float], service_s: Sequence[dict[int, float]]) -> OccupiedTime:
    """All ``requests`` wait at the start and none comes later: whole rounds of equal service times."""

    def occupied(number: int, degree: int, count: int) -> float:
        # The share of a class is rarely a whole number; a hair above one must not cost a whole round.
        return math.ceil(requests * shares[number] / count - 1e-9) * service_s[number][degree]

    return occupied


def online_time(
    rate: float, shares: Sequence[float], service_s: Sequence[dict[int, float]], halving: Halving = Halving.USUAL
) -> OccupiedTime:
    """Poisson arrivals at ``rate`` requests a second: the mean time from arrival to end, M/D/1 or M/D/c."""

    def occupied(number: int, degree: int, count: int) -> float:
        return sojourn_s(rate * shares[number], service_s[number][degree], count, halving)

    return occupied


def sojourn_s(rate: float, service_s: float, servers: int, halving: Halving = Halving.USUAL) -> float:
    """Mean waiting plus service of M/D/c; infinite where the servers cannot keep up."""
    offered = rate * service_s
    load = offered / servers
    if load >= 1:
        return math.inf
    if servers == 1:
        return service_s + load * service_s / (2 * (1 - load))
    waiting = mm_c_waiting_s(rate, service_s, servers)
    return (service_s + waiting) / 2 if halving is Halving.REPORTED else service_s + waiting / 2


def mm_c_waiting_s(rate: float, service_s: float, servers: int) -> float:
    """Mean waiting of M/M/c, by Erlang's recursion (the paper's factorials by Stirling would overflow or be coarse)."""
    offered = rate * service_s
    blocking = 1.0
    for number in range(1, servers + 1):
        blocking = offered * blocking / (number + offered * blocking)
    load = offered / servers
    delayed = blocking / (1 - load + load * blocking)
    return delayed * service_s / (servers - offered)
