"""The bound of DDiT's algorithm 1 against brute force, and its queue formulas against their closed forms."""

import itertools
import math

import pytest

from loadgen.simulator.lower_bound import (
    Halving,
    OccupiedTime,
    batch_time,
    groups,
    lower_bound,
    mm_c_waiting_s,
    online_time,
    sojourn_s,
)

SERVICE_S = [{1: 3.1, 2: 3.1, 4: 3.4}, {1: 7.9, 2: 4.5, 4: 3.7}, {1: 19.3, 2: 10.8, 4: 6.2}]


def _brute_force(gpus: int, classes: int, degrees: tuple[int, ...], server_size: int, occupied: OccupiedTime) -> float:
    """Every way to cut a stretch of GPUs that ends at the last one, and every choice of degrees."""
    best = math.inf
    for start in range(gpus):
        for cuts in itertools.combinations(range(start + 1, gpus), classes - 1):
            edges = (start, *cuts, gpus)
            for choice in itertools.product(degrees, repeat=classes):
                total = 0.0
                for number, degree in enumerate(choice):
                    first, end = edges[number], edges[number + 1]
                    count = groups(first, end - first, degree, server_size)
                    total += (end - first) * occupied(number, degree, count) if count else math.inf
                best = min(best, total)
    return best


def test_groups_do_not_cross_servers() -> None:
    assert [groups(0, 15, degree, 8) for degree in (1, 2, 4, 8)] == [15, 7, 3, 1]
    assert groups(6, 4, 4, 8) == 0
    assert groups(6, 4, 2, 8) == 2


@pytest.mark.parametrize("gpus", [3, 5, 8])
@pytest.mark.parametrize("server_size", [2, 4, 8])
@pytest.mark.parametrize("requests", [1, 7, 30])
def test_batch_bound_equals_brute_force(gpus: int, server_size: int, requests: int) -> None:
    occupied = batch_time(requests, [0.5, 0.3, 0.2], SERVICE_S)
    bound = lower_bound(gpus, 3, (1, 2, 4), server_size, occupied)
    assert bound.gpu_seconds == pytest.approx(_brute_force(gpus, 3, (1, 2, 4), server_size, occupied))


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("halving", list(Halving))
def test_online_bound_equals_brute_force(rate: float, halving: Halving) -> None:
    occupied = online_time(rate, [1 / 3, 1 / 3, 1 / 3], SERVICE_S, halving)
    bound = lower_bound(8, 3, (1, 2, 4), 8, occupied)
    assert bound.gpu_seconds == pytest.approx(_brute_force(8, 3, (1, 2, 4), 8, occupied))


def test_the_plan_adds_up_to_the_bound_and_its_blocks_do_not_overlap() -> None:
    bound = lower_bound(64, 3, (1, 2, 4, 8), 8, online_time(3.0, [1 / 3] * 3, [{**s, 8: 9.0} for s in SERVICE_S]))
    assert sum(block.gpus * block.occupied_s for block in bound.blocks) == pytest.approx(bound.gpu_seconds)
    for before, after in itertools.pairwise(bound.blocks):
        assert before.first + before.gpus == after.first


def test_an_impossible_load_is_refused() -> None:
    with pytest.raises(ValueError, match="no partition"):
        lower_bound(8, 3, (1, 2, 4), 8, online_time(5.0, [1 / 3] * 3, SERVICE_S))


def test_waiting_follows_the_textbook() -> None:
    # M/M/1: W_q = rho / (mu (1 - rho)); M/M/2: W_q = rho^2 / (mu (1 - rho^2)).
    assert mm_c_waiting_s(0.5, 1.0, 1) == pytest.approx(1.0)
    assert mm_c_waiting_s(1.0, 1.0, 2) == pytest.approx(0.25 / 0.75)
    assert sojourn_s(0.5, 1.0, 1) == pytest.approx(1.5)
    # As reported, the sojourn at no load is half the service time: the slip that ``USUAL`` does not make.
    assert sojourn_s(1e-9, 1.0, 2, Halving.REPORTED) == pytest.approx(0.5)
    assert sojourn_s(1e-9, 1.0, 2, Halving.USUAL) == pytest.approx(1.0)
    assert math.isinf(sojourn_s(2.0, 1.0, 2))
