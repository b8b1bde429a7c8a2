"""Roles by least delay, on clusters to reckon by hand. A prompt token takes 1 ms, a decoding pass 20 ms."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages.cluster import LanguageRole
from common.policies.language.chat_dispatch import ChatDispatch
from common.policies.language.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    Event,
    InstanceJoined,
    InstanceLost,
    RouteSequence,
)
from common.policies.language.chat_rule import ChatRule
from common.policies.language.least_delay import LeastDelay
from common.policies.language.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.language.routing import Costs

COSTS = Costs(RateCost(1000.0), DecodeCost(0.020, 0.001, 0.000001), LinkCost(10_000.0, 0.0), 1, 1, 512)
ROLES = (LanguageRole.PREFILL, LanguageRole.DECODE)


class Cluster:
    """Fused instances under this rule; each sequence has one route only."""

    def __init__(self, count: int) -> None:
        self.dispatch = ChatDispatch(1, ChatRule(LeastDelay(1.0), COSTS, corrects=False))
        self.epochs: dict[str, int] = {}
        for number in range(count):
            self.join(f"l{number}")

    def join(self, name: str, now_s: float = 0.0) -> list[RouteSequence]:
        return self.tell(InstanceJoined(name, ROLES, 50_000), now_s)

    def tell(self, event: Event, now_s: float) -> list[RouteSequence]:
        routes = self.dispatch.handle(event, now_s)
        self.epochs |= {route.request_id: route.epoch for route in routes}
        return routes

    def prefilled(self, name: str, now_s: float = 0.0) -> None:
        self.tell(ChatPrefilled(name, self.epochs.get(name, 0)), now_s)

    def ended(self, name: str, now_s: float = 0.0) -> None:
        self.tell(ChatEnded(name, None), now_s)

    def lost(self, name: str, now_s: float = 0.0) -> None:
        self.tell(InstanceLost(name), now_s)


def _came(name: str, prompt: int = 500, answer: int = 100, **cached: int) -> ChatArrived:
    return ChatArrived(name, "gateway", 0.0, prompt, answer, cached=cached)


def _route(cluster: Cluster, came: ChatArrived, now_s: float = 0.0) -> RouteSequence:
    (chosen,) = cluster.tell(came, now_s)
    assert chosen.reason
    return chosen


def _where(cluster: Cluster, came: ChatArrived, now_s: float = 0.0) -> tuple[str, str]:
    chosen = _route(cluster, came, now_s)
    return chosen.prefill, chosen.decode


def test_a_burst_is_spread_and_each_stays_where_it_was_prefilled() -> None:
    cluster = Cluster(3)
    routes = [_route(cluster, _came(name)) for name in "abc"]
    assert [(route.prefill, route.decode) for route in routes] == [(f"l{n}", f"l{n}") for n in range(3)]


def test_a_prompt_goes_where_it_stalls_nobody() -> None:
    """At l0 twenty sequences decode: 2 s of prompt would cost each of them most of that."""
    cluster = Cluster(2)
    cluster.lost("l1", 0.0)
    for number in range(20):
        _route(cluster, _came(f"running-{number}", prompt=10))
        cluster.prefilled(f"running-{number}", 0.0)
    cluster.join("l1", 0.0)
    assert _route(cluster, _came("new", prompt=2000)).prefill == "l1"


def test_prefill_and_decode_part_when_one_place_is_busy_with_prompts() -> None:
    cluster = Cluster(2)
    cluster.lost("l1", 0.0)
    for number in range(10):
        _route(cluster, _came(f"prompt-{number}", prompt=2000, answer=1))
    cluster.join("l1", 0.0)
    held_there = _route(cluster, _came("new", prompt=1000, answer=500, l0=999))
    assert (held_there.prefill, held_there.decode) == ("l0", "l1")


def test_a_prefix_is_worth_the_time_it_saves_and_no_more() -> None:
    cluster = Cluster(2)
    _route(cluster, _came("queued", prompt=600, answer=1))  # at l0
    assert _route(cluster, _came("a", prompt=1000, l0=900)).prefill == "l0"
    cluster.ended("a", 0.0)
    assert _route(cluster, _came("b", prompt=1000, l0=100)).prefill == "l1"


def test_what_ends_or_leaves_is_forgotten() -> None:
    cluster = Cluster(2)
    assert _route(cluster, _came("a")).prefill == "l0"
    cluster.ended("a", 0.0)
    cluster.ended("a", 0.0)
    assert _route(cluster, _came("b"), 1000.0).prefill == "l0"
    cluster.lost("l0", 1000.0)
    cluster.prefilled("b", 1000.0)
    assert _route(cluster, _came("c"), 1000.0).prefill == "l1"


def test_who_comes_back_is_not_charged_for_what_it_had_before() -> None:
    cluster = Cluster(1)
    for name in "abc":
        _route(cluster, _came(name))
    cluster.lost("l0", 0.0)
    cluster.join("l0", 0.0)
    fresh = Cluster(1)
    for name in "abc":
        cluster.prefilled(name, 1.0)
        cluster.ended(name, 1.0)
    again, first = _route(cluster, _came("new"), 1.0), _route(fresh, _came("new"), 1.0)
    assert (again.prefill, again.decode, again.reason) == (first.prefill, first.decode, first.reason)


def test_without_an_instance_a_sequence_waits() -> None:
    cluster = Cluster(0)
    assert cluster.tell(_came("a"), 0.0) == cluster.tell(_came("gone"), 0.0) == []
    cluster.ended("gone")
    (chosen,) = cluster.join("l0", 1.0)
    assert chosen.request_id == "a"


@settings(max_examples=50, deadline=None)
@given(events=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_books_are_empty_when_all_is_over(events: list[tuple[int, int]]) -> None:
    """Whatever order things happen in: a cluster on which everything has ended routes like a fresh one."""
    cluster = Cluster(2)
    for number, (sequence, what) in enumerate(events):
        name, now_s = str(sequence), float(number)
        if what < 2:
            assert len(cluster.tell(_came(name, prompt=100 + 300 * what), now_s)) == 1
        elif what == 2:
            cluster.prefilled(name, now_s)
        else:
            cluster.ended(name, now_s)
    for sequence in range(6):
        cluster.ended(str(sequence), 100.0)
    late_s = 1e6  # the share of prefill is forgotten
    fresh = Cluster(2)
    for name in "abcd":
        assert _where(cluster, _came(name), late_s) == _where(fresh, _came(name), late_s)
