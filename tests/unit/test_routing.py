"""The global scheduler: its books, and what each rule chooses."""

import pytest

from common.policies.language.prefill_cost import LLAMA2_13B_DECODE, LLAMA2_13B_LONG, LinkCost
from common.policies.language.prompt_index import IndexPublisher, PromptIndex
from common.policies.language.routing import (
    Costs,
    GlobalScheduler,
    InstanceJoined,
    InstanceLost,
    Pull,
    RequestArrived,
    RequestEnded,
    RequestPrefilled,
    Route,
    Rule,
)
from common.policies.language.routing_rules import RULES, AddedTime, LeastCost, UnknownRule, make_rule
from common.policies.language.sites import InstanceKind

BLOCK = 4  # bytes of packed tokens
BLOCK_TOKENS = 512
FAST, SLOW = LinkCost(87e9, 0.0), LinkCost(1e9, 0.0)


def prompt(*blocks: int) -> bytes:
    return b"".join(bytes([block]) * BLOCK for block in blocks)


def arrived(name: str, *blocks: int, conversation: str = "", answer: int = 100) -> RequestArrived:
    return RequestArrived(name, conversation or name, prompt(*blocks), BLOCK_TOKENS * len(blocks) + 1, answer)


class Scene:
    """A scheduler with instances; what they have is published."""

    def __init__(self, rule: Rule, kinds: str, link: LinkCost = FAST, expects: bool = False) -> None:
        costs = Costs(LLAMA2_13B_LONG, LLAMA2_13B_DECODE, link, 819_200, BLOCK_TOKENS)
        self.scheduler = GlobalScheduler(rule, PromptIndex(BLOCK), costs, expects)
        self.publishers: dict[str, IndexPublisher] = {}
        for number, letter in enumerate(kinds):
            kind = {"p": InstanceKind.PREFILL, "d": InstanceKind.DECODE, "f": InstanceKind.FUSED}[letter]
            self.publishers[f"{letter}{number}"] = IndexPublisher(f"{letter}{number}", 1, BLOCK)
            self.scheduler.handle(InstanceJoined(f"{letter}{number}", kind, 140_000), 0.0)

    def has(self, instance: str, *blocks: int) -> None:
        assert self.scheduler.published(self.publishers[instance].inserted(prompt(*blocks))) == []

    def route(self, name: str, *blocks: int, conversation: str = "", now_s: float = 0.0) -> Route:
        (route,) = self.scheduler.handle(arrived(name, *blocks, conversation=conversation), now_s)
        return route


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_one_of_each_kind_and_the_books_come_out_even(rule: str) -> None:
    scene = Scene(make_rule(rule), "ppddf")
    scene.has("p1", 1, 2)
    scene.has("d2", 1, 2, 3)
    for number in range(20):
        route = scene.route(f"r{number}", 1, 2, 3, number + 10)
        assert scene.scheduler.sites[route.prefill].prefills
        assert scene.scheduler.sites[route.decode].decodes
        assert (route.prefill == route.decode) == (route.prefill == "f4")
        assert route.reason
    for number in range(20):
        scene.scheduler.handle(RequestPrefilled(f"r{number}"), 1.0)
        scene.scheduler.handle(RequestPrefilled(f"r{number}"), 1.0)
        scene.scheduler.handle(RequestEnded(f"r{number}"), 2.0)
    for site in scene.scheduler.sites.values():
        assert (site.queue_s, site.prefill_tokens, site.sequences, site.context_tokens, site.answer_tokens) == (
            (0.0,) + (0,) * 4
        )


def test_an_unknown_rule_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownRule, match="prompt_tree"):
        make_rule("nearest")


def test_least_load_goes_by_what_is_yet_to_be_prefilled() -> None:
    scene = Scene(make_rule("least_load"), "ff")
    assert [scene.route(f"r{number}", number).prefill for number in range(3)] == ["f0", "f1", "f0"]


def test_a_conversation_stays_where_it_was() -> None:
    scene = Scene(make_rule("session"), "fff")
    first = scene.route("a", 1, conversation="x").prefill
    scene.route("b", 2, conversation="y")
    assert scene.route("c", 9, 9, conversation="x").prefill == first
    scene.scheduler.handle(InstanceLost(first), 0.0)
    assert scene.route("d", 9, conversation="x").prefill != first


def test_the_longest_prefix_wins_whatever_the_load() -> None:
    scene = Scene(make_rule("prompt_tree"), "ff")
    scene.has("f1", 1, 2)
    assert [scene.route(f"r{number}", 1, 2, 3).prefill for number in range(5)] == ["f1"] * 5


def test_cost_leaves_the_longest_prefix_when_its_queue_is_longer_than_what_it_saves() -> None:
    scene = Scene(LeastCost(), "ff", link=SLOW)
    scene.has("f1", 1)
    chosen = [scene.route(f"r{number}", 1, 2, 3, 4, 5, 6, 7, 8) for number in range(4)]
    assert chosen[0].prefill == "f1"
    assert {route.prefill for route in chosen} == {"f0", "f1"}
    assert all(route.pull is None for route in chosen)


def test_a_pull_is_worth_it_where_the_link_is_faster_than_computing() -> None:
    for link, pulls in ((FAST, True), (SLOW, False)):
        scene = Scene(LeastCost(), "ff", link=link)
        scene.has("f1", *range(1, 21))
        busy = scene.route("busy", *range(100, 130))
        scene.scheduler.sites["f1"].queue_s += 10.0
        scene.scheduler.handle(RequestPrefilled("busy"), 0.0)
        assert busy.prefill == "f0"
        route = scene.route("r", *range(1, 21), 50)
        assert route.prefill == "f0"
        assert route.pull == (Pull("f1", 0, 20 * BLOCK_TOKENS) if pulls else None)
        assert route.cached_tokens == (20 * BLOCK_TOKENS if pulls else 0)


def test_what_is_not_worth_a_hand_over_stays_on_a_fused_instance() -> None:
    for link, prefill in ((SLOW, "f2"), (LinkCost(1e15, 0.0), "p0")):
        scene = Scene(LeastCost(), "pdf", link=link)
        scene.scheduler.sites["f2"].queue_s = 0.1
        assert scene.route("r", *range(20)).prefill == prefill


def test_decode_goes_where_most_is_held_unless_that_has_much_more_to_do() -> None:
    scene = Scene(make_rule("prompt_tree"), "pdd")
    scene.has("d2", 1, 2)
    assert scene.route("r1", 1, 2, 3).decode == "d2"
    scene.scheduler.sites["d2"].context_tokens += 100_000
    assert scene.route("r2", 1, 2, 3).decode == "d1"


def test_added_time_spares_those_that_decode() -> None:
    scene = Scene(AddedTime(), "ff")
    scene.has("f1", 1)
    scene.scheduler.sites["f1"].contexts = {str(number): 0 for number in range(20)}
    assert scene.route("r", 1, *range(2, 30)).prefill == "f0"


def test_added_time_sees_where_there_is_no_room() -> None:
    scene = Scene(AddedTime(), "ff")
    scene.has("f1", *range(1, 30))
    site = scene.scheduler.sites["f1"]
    site.contexts, site.context_tokens, site.answer_tokens = {"long": 135_000}, 135_000, 4000
    assert scene.route("r", *range(1, 30)).prefill == "f0"


def test_time_that_a_prefill_has_had_is_not_ahead_any_more() -> None:
    scene = Scene(AddedTime(), "f")
    site = scene.scheduler.sites["f0"]
    scene.route("first", *range(20), now_s=1.0)
    took_s = site.queue_s
    scene.route("second", *range(100, 120), now_s=1.25)
    assert site.left_s == pytest.approx(took_s - 0.25)
    scene.scheduler.handle(RequestPrefilled("first"), 1.5)
    rest_s = site.queue_s
    scene.route("third", 7, now_s=1.75)
    assert site.left_s == pytest.approx(rest_s - 0.25)
    scene.route("fourth", 8, now_s=100.0)
    assert site.left_s >= 0.0


def test_requests_in_flight_with_one_beginning_meet_if_it_is_expected() -> None:
    scene = Scene(make_rule("prompt_tree"), "ff", expects=True)
    assert scene.route("a", 1, 2, 3).prefill == scene.route("b", 1, 2, 4).prefill
    assert scene.route("c", 1, 2, 5).cached_tokens == 2 * BLOCK_TOKENS


def test_who_comes_before_any_instance_waits_for_one() -> None:
    scene = Scene(make_rule("cost"), "p")
    assert scene.scheduler.handle(arrived("early", 1), 0.0) == []
    assert scene.scheduler.handle(arrived("gone", 1), 0.0) == []
    assert scene.scheduler.handle(RequestEnded("gone"), 0.0) == []
    (route,) = scene.scheduler.handle(InstanceJoined("d", InstanceKind.DECODE, 140_000), 0.0)
    assert (route.request_id, route.prefill, route.decode) == ("early", "p0", "d")


def test_what_a_lost_instance_had_to_do_bears_on_nobody() -> None:
    scene = Scene(make_rule("least_load"), "pd")
    scene.route("r", 1, 2)
    scene.scheduler.handle(InstanceLost("d1"), 0.0)
    assert scene.scheduler.sites["p0"].prefill_tokens == 0
    scene.scheduler.handle(InstanceJoined("d1", InstanceKind.DECODE, 140_000), 0.0)
    scene.scheduler.handle(RequestEnded("r"), 0.0)
    assert scene.scheduler.sites["d1"].sequences == 0
