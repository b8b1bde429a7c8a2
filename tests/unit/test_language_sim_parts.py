"""The simulator's parts for language: virtual time, links that are shared, engines that keep their books."""

import pytest

from common.messages.cluster import LanguageRole
from common.policies.continuous_batching import ContinuousBatching
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.cluster import FUSED, Cluster
from loadgen.simulator.language.cost import OPT_13B_2_V100, StepWork
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.link import LinkKind, Network
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.router import LeastLoad

SPLIT = ((LanguageRole.PREFILL,), (LanguageRole.DECODE,))


def _cluster(roles: tuple[tuple[LanguageRole, ...], ...]) -> Cluster:
    clock = Clock()
    cluster = Cluster(clock, LeastLoad(), Network(clock, LinkKind("test", 1e9, 0.001)))
    for number, of_one in enumerate(roles):
        batching = ContinuousBatching(OPT_13B_2_V100.blocks)
        cluster.add(Instance(f"language-{number}", clock, OPT_13B_2_V100, batching, cluster), of_one)
    return cluster


def test_time_goes_in_order_and_never_back() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, lambda: seen.append("late"))
    clock.at(1.0, lambda: clock.after(0.5, lambda: seen.append("middle")))
    clock.at(1.0, lambda: seen.append("second"))
    clock.run()
    assert seen == ["second", "middle", "late"] and clock.now_s == 2.0
    with pytest.raises(ValueError, match="past"):
        clock.at(1.0, lambda: None)


def test_transfers_share_the_ends_they_have_in_common() -> None:
    clock = Clock()
    network = Network(clock, LinkKind("test", 1000.0, 0.5))
    ends: dict[str, float] = {}

    def send(name: str, source: str, target: str, size: int) -> None:
        network.send(source, target, size, 1, lambda: ends.update({name: clock.now_s}))

    send("a", "p0", "d0", 1000)  # half the rate for 2 s beside b
    send("b", "p0", "d1", 2000)  # then all of it
    send("c", "p1", "d2", 1000)  # nobody else's ends
    clock.run()
    assert ends == pytest.approx({"a": 2.5, "b": 3.5, "c": 1.5})
    assert network.sent_bytes == 4000 and network.messages == 3


def test_an_unshared_link_takes_bytes_over_bandwidth() -> None:
    clock = Clock()
    network = Network(clock, LinkKind("test", 1000.0, 0.0, shared=False))
    ends: list[float] = []
    for _ in range(2):
        network.send("p", "d", 1000, 1, lambda: ends.append(clock.now_s))
    clock.run()
    assert ends == pytest.approx([1.0, 1.0])


def test_one_request_costs_its_steps_and_its_transfer() -> None:
    cost = OPT_13B_2_V100.cost
    cluster = _cluster(SPLIT)
    progress = cluster.run([ChatRequest("a", 1.0, 512, 3)])["a"]
    prefill_s = cost.step_s(StepWork(512, 0, 0, 0))
    assert progress.ttft_s == pytest.approx(prefill_s)
    transfer_s = 0.001 + 512 * OPT_13B_2_V100.kv_token_bytes / 1e9
    decode_s = sum(cost.step_s(StepWork(0, 0, 1, 513 + token)) for token in range(2))
    assert progress.jct_s == pytest.approx(prefill_s + transfer_s + decode_s)
    assert (progress.prefilled_by, progress.decoded_by) == ("language-0", "language-1")


@pytest.mark.parametrize("roles", [SPLIT, (FUSED, FUSED)])
def test_everything_ends_and_all_memory_is_free(roles: tuple[tuple[LanguageRole, ...], ...]) -> None:
    cluster = _cluster(roles)
    requests = [ChatRequest(f"r{n}", 0.01 * n, 1 + 97 * n % 900, 1 + 61 * n % 400) for n in range(150)]
    progress = cluster.run(requests)
    assert len(progress) == 150
    assert all(one.request.arrival_s < one.first_token_s <= one.end_s < float("inf") for one in progress.values())
    assert all(one.idle and one.free_blocks == OPT_13B_2_V100.blocks for one in cluster.instances.values())
    assert sum(one.preempted for one in progress.values()) > 0 or roles != SPLIT
