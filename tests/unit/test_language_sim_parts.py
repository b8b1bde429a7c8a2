"""The simulator's parts for language: virtual time, links that are shared, engines that keep their books."""

from dataclasses import replace

import pytest

from common.messages.cluster import LanguageRole
from common.policies.language.continuous_batching import ContinuousBatching
from common.policies.language.length_prediction import LengthBuckets
from loadgen.simulator.language.arms import fluid, tetriinfer
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.cluster import FUSED, Cluster
from loadgen.simulator.language.cost import OPT_13B_2_V100, StepWork
from loadgen.simulator.language.decode_only import decode_all
from loadgen.simulator.language.history import Histories
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.link import V100_HOST, HostLink, LinkKind, Network
from loadgen.simulator.language.predictors import NoisyOracle, Oracle, PredictorTax
from loadgen.simulator.language.requests import ChatRequest
from loadgen.simulator.language.router import LeastLoad
from loadgen.simulator.language.setups import CHUNK_OVERHEAD_S, Setup, build

SPLIT = ((LanguageRole.PREFILL,), (LanguageRole.DECODE,))


def _cluster(roles: tuple[tuple[LanguageRole, ...], ...]) -> Cluster:
    clock = Clock()
    cluster = Cluster(clock, LeastLoad(clock), Network(clock, LinkKind("test", 1e9, 0.001)))
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


def test_a_preempted_sequence_goes_to_the_host_and_comes_back_uncomputed() -> None:
    """Six blocks: the first sequence needs a fourth when the second has three, of which the last is not full."""
    machine = replace(OPT_13B_2_V100, kv_tokens=96)
    requests = [ChatRequest("first", 0.0, 32, 25), ChatRequest("second", 0.0, 20, 25)]
    link = HostLink(cards=2, bytes_per_s=1e9, copies=80, copy_s=1e-5)
    ends = []
    for swap in (link, replace(link, bytes_per_s=float("inf"), copy_s=0.0)):
        run = decode_all(Setup("one", decode=1, swap=swap), requests, 0, machine)
        instance = run.instances["decode-0"]
        assert [run.progress[one.name].preempted for one in requests] == [0, 1]
        assert instance.computed_prompt_tokens == 0 and instance.idle and instance.free_blocks == machine.blocks
        ends.append(run.progress["second"].end_s)
    block_s = 80 * 1e-5 + 16 * machine.kv_token_bytes / 2 / 1e9
    assert ends[0] - ends[1] == pytest.approx(2 * 3 * block_s)


def test_swapping_on_the_papers_cards_is_cheaper_than_computing_again() -> None:
    """By 40 % for a sequence of 640 tokens, there and back."""
    swapped_s = 2 * V100_HOST.seconds(40, OPT_13B_2_V100.block_bytes)
    assert swapped_s == pytest.approx(0.6 * OPT_13B_2_V100.cost.step_s(StepWork(640, 0, 0, 0)), rel=0.1)


def test_a_history_keeps_the_latest_and_matches_from_the_first_block_on() -> None:
    histories = Histories(blocks=4, block_tokens=16)
    histories.add("a")
    first = ChatRequest("first", 0.0, 50, 30, (1, 2, 3), (4, 5))
    histories.prefilled(first, "a")
    again = ChatRequest("again", 1.0, 48, 5, (1, 2, 3))
    assert histories.tokens_at(again) == {"a": 47}  # the last token is always computed
    assert histories.tokens_at(ChatRequest("longer", 1.0, 80, 5, (1, 2, 9))) == {"a": 32}
    histories.ended(first, "a")  # five blocks, of which the first goes
    assert histories.tokens_at(again) == {} and histories.tokens_at(ChatRequest("none", 0.0, 40, 5)) == {}


def test_a_prefix_is_computed_once_and_travels_once() -> None:
    """The second turn's prompt begins with the first one's and its answer."""
    requests = [
        ChatRequest("one", 0.0, 160, 33, tuple(range(10)), (10, 11)),
        ChatRequest("two", 30.0, 200, 5, tuple(range(12)), ()),
    ]
    built = build(replace(fluid(1), name="alone"), requests, 0)
    progress = built.cluster.run(requests)
    assert [one.cached_tokens for one in progress.values()] == [0, 192]
    (instance,) = built.cluster.instances.values()
    assert instance.computed_prompt_tokens == 160 + 8


def test_what_is_padded_costs_a_whole_chunk() -> None:
    requests = [ChatRequest("a", 0.0, 100, 2)]
    built = build(replace(tetriinfer("t", 1, 1), taxed=False), requests, 0)
    progress = built.cluster.run(requests)["a"]
    assert progress.ttft_s == pytest.approx(OPT_13B_2_V100.cost.step_s(StepWork(512, 0, 0, 0)) + CHUNK_OVERHEAD_S)
    assert built.cluster.instances["language-0"].padding_tokens == 412


def test_a_predictor_beside_the_model_makes_it_slower_while_it_runs() -> None:
    tax = PredictorTax(token_s=0.001, slower=1.5)
    assert tax.predict(300, 1.0) == pytest.approx(1.3) and tax.predict(300, 1.1) == pytest.approx(1.6)
    assert tax.slowed(1.0, 0.2) == pytest.approx(0.3)  # all of it beside the predictor
    assert tax.slowed(1.3, 1.0) == pytest.approx(0.3 + 0.8)  # 0.3 s of it, in which a third less is done
    assert tax.slowed(2.0, 1.0) == 1.0


def test_a_noisy_oracle_is_right_as_often_as_it_says_and_never_far_off() -> None:
    buckets = LengthBuckets(200, 11)
    requests = [ChatRequest(str(number), 0.0, 10, 1 + 7 * number % 2000) for number in range(4000)]
    noisy = NoisyOracle(buckets, 0.749, seed=1)
    noisy.prepare([request.name for request in requests])
    off = [noisy.predict(one).low // 200 - buckets.bucket(one.answer_tokens) for one in requests]
    assert off.count(0) / len(off) == pytest.approx(0.749, abs=0.02)
    assert off.count(1) / len(off) == pytest.approx(off.count(-1) / len(off), abs=0.03)
    assert [noisy.predict(one) for one in requests[:9]] == [noisy.predict(one) for one in requests[:9]]
    exact = Oracle(buckets, exact=True).predict(requests[5])
    assert (exact.low, exact.high) == (36, 37)
