"""What a chat's route is worth once it has been seen how long things take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages.cluster import LanguageRole
from common.policies.language.chat_dispatch import ChatDispatch
from common.policies.language.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    InstanceJoined,
    InstanceLost,
    PrefixPulled,
    RouteSequence,
)
from common.policies.language.chat_rule import ChatRule
from common.policies.language.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.language.routing import Costs, Pull
from common.policies.language.routing_rules import make_rule
from common.policies.language.seen_costs import SeenDelay, SeenRatio

PREFILL, DECODE = (LanguageRole.PREFILL,), (LanguageRole.DECODE,)
FUSED = PREFILL + DECODE


def cluster(rule: str, link_tokens_s: float = 1000.0, **roles: tuple[LanguageRole, ...]) -> ChatDispatch:
    """It prefills 100 tokens a second, and sends what so many have left behind."""
    costs = Costs(RateCost(100.0), DecodeCost(0.01, 0.0, 0.0), LinkCost(link_tokens_s, 0.0), 1, 16)
    dispatch = ChatDispatch(1, ChatRule(make_rule(rule), costs))
    for name, own in roles.items():
        dispatch.handle(InstanceJoined(name, own, 10_000), 0.0)
    return dispatch


def route(dispatch: ChatDispatch, name: str, prompt: int, now_s: float, **cached: int) -> RouteSequence:
    arrived = ChatArrived(name, "gateway-0", 0.0, prompt, 10, cached=cached)
    (decision,) = dispatch.handle(arrived, now_s)
    return decision


def test_prefills_that_take_twice_as_long_are_taken_for_that_from_then_on() -> None:
    dispatch = cluster("cost", f0=FUSED)
    first = route(dispatch, "first", 200, 10.0)
    second = route(dispatch, "second", 100, 11.0)
    dispatch.handle(ChatPrefilled("first", first.epoch), 14.0)
    assert dispatch.rule.prefills.factor == pytest.approx(2.0)
    # The second began when the first was done.
    dispatch.handle(ChatPrefilled("second", second.epoch), 16.0)
    assert dispatch.rule.prefills.factor == pytest.approx(2.0)
    assert "least cost: 2.000 s" in route(dispatch, "third", 100, 20.0).reason


def test_what_two_take_together_counts_and_not_who_of_them_seems_to() -> None:
    dispatch = cluster("cost", f0=FUSED)
    epochs = [route(dispatch, name, 100, 0.0).epoch for name in ("a", "b")]
    for name, epoch in zip("ab", epochs, strict=True):
        dispatch.handle(ChatPrefilled(name, epoch), 2.0)
    assert dispatch.rule.prefills.factor == pytest.approx(1.0, abs=0.05)


def test_who_gives_up_teaches_nothing_and_leaves_the_one_at_work_its_time() -> None:
    dispatch = cluster("added_time", f0=FUSED)
    first = route(dispatch, "first", 200, 0.0)
    route(dispatch, "second", 200, 0.5)
    dispatch.handle(ChatEnded("second", None), 1.0)
    assert dispatch.rule.prefills.factor == 1.0
    dispatch.handle(ChatPrefilled("first", first.epoch), 2.0)
    assert dispatch.rule.prefills.factor == pytest.approx(1.0)


def test_time_that_a_prefill_has_had_is_not_waited_for_any_more() -> None:
    dispatch = cluster("added_time", f0=FUSED, f1=FUSED)
    assert route(dispatch, "early", 300, 0.0).prefill == "f0"
    assert route(dispatch, "late", 200, 2.0).prefill == "f1"
    # 3 s and 2 s were queued; by now 0.5 s are left at f0 and 1.5 s at f1.
    assert route(dispatch, "next", 100, 2.5).prefill == "f0"


@pytest.mark.parametrize("came", [480, 0])
def test_pulls_that_take_long_or_do_not_come_are_given_up_for_a_while(came: int) -> None:
    dispatch = cluster("cost", f0=FUSED, f1=FUSED)
    route(dispatch, "busy", 2000, 0.0, f1=1000)
    one = route(dispatch, "one", 500, 0.0, f1=480)
    assert one.pull == Pull("f1", 0, 480) and one.prefill == "f0"
    dispatch.handle(PrefixPulled("one", one.epoch, came), 8.48)
    assert dispatch.rule.pulls.delay_s(8.48) == pytest.approx(8.0)
    # 4.8 s of computing are less than 8.5 s of waiting. A minute later half of that is forgotten.
    assert route(dispatch, "two", 500, 9.0, f1=480).pull is None
    for name in ("one", "two"):
        dispatch.handle(ChatEnded(name, None), 10.0)
    assert route(dispatch, "three", 500, 70.0, f1=480).pull is not None


def test_what_an_instance_is_sent_after_its_loss_or_by_nobody_changes_nothing() -> None:
    dispatch = cluster("cost", f0=FUSED, f1=FUSED)
    route(dispatch, "busy", 2000, 0.0, f1=1000)
    pulling = route(dispatch, "pulling", 500, 0.0, f1=480)
    dispatch.handle(InstanceLost("f1"), 0.1)
    dispatch.handle(PrefixPulled("pulling", pulling.epoch, 0), 0.2)
    dispatch.handle(PrefixPulled("unknown", 7, 16), 0.2)
    assert dispatch.rule.pulls.delay_s(0.2) == 0.0


@pytest.mark.parametrize("died", ["f0", "f1"])
def test_a_pull_that_a_death_has_ended_does_not_make_the_others_slow(died: str) -> None:
    dispatch = cluster("cost", f0=FUSED, f1=FUSED)
    route(dispatch, "busy", 2000, 0.0, f1=1000)
    pulling = route(dispatch, "pulling", 500, 0.0, f1=480)
    assert pulling.pull is not None
    dispatch.handle(InstanceLost(died), 1.0)
    dispatch.handle(InstanceJoined(died, FUSED, 10_000), 2.0)
    dispatch.handle(PrefixPulled("pulling", pulling.epoch, 0), 8.0)
    assert dispatch.rule.pulls.delay_s(8.0) == 0.0


def test_the_end_of_a_pull_from_a_former_life_frees_nothing_of_this_one() -> None:
    dispatch = cluster("cost", f0=FUSED, f1=FUSED, f2=FUSED)
    route(dispatch, "busy", 2000, 0.0, f1=1000)
    former = route(dispatch, "former", 485, 0.0, f1=480)
    dispatch.handle(InstanceLost("f1"), 0.1)
    dispatch.handle(InstanceJoined("f1", FUSED, 10_000), 0.1)
    route(dispatch, "busy again", 2000, 0.2, f1=1000)
    now = route(dispatch, "now", 250, 0.2, f1=240)
    assert (former.prefill, now.prefill) == ("f0", "f2") and now.pull == Pull("f1", 0, 240)
    dispatch.handle(PrefixPulled("former", former.epoch, 0), 0.3)
    after = route(dispatch, "after", 250, 0.3, f1=240)
    assert after.prefill == "f0" and after.pull is not None
    # It begins where the other one ends, at 0.44 s.
    dispatch.handle(PrefixPulled("after", after.epoch, 240), 0.68)
    assert dispatch.rule.pulls.delay_s(0.68) == pytest.approx(0.0, abs=1e-9)


def test_who_is_cheaper_fused_is_not_taken_apart_and_who_is_not_is() -> None:
    """One fused instance among split ones, whose link carries the keys and values of 50 tokens a second."""
    dispatch = cluster("cost", 50.0, p0=PREFILL, d0=DECODE, f0=FUSED)
    fused = route(dispatch, "first", 100, 0.0)
    assert (fused.prefill, fused.decode) == ("f0", "f0")
    # 1 s of prefill and 2 s of hand-over are less than 6 s of queue.
    route(dispatch, "long", 500, 0.0)
    split = route(dispatch, "second", 100, 0.0)
    assert (split.prefill, split.decode) == ("p0", "d0")
    # What the decode instance has already need not be handed over.
    dispatch.handle(ChatEnded("first", None), 0.0)
    dispatch.handle(ChatEnded("long", None), 0.0)
    dispatch.handle(ChatEnded("second", None), 0.0)
    assert route(dispatch, "third", 100, 0.0, p0=80, d0=90).prefill == "p0"
    assert route(dispatch, "fourth", 100, 0.0, p0=80).prefill == "f0"


@given(pairs=st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(0.0, 1e3)), max_size=60))
def test_no_correction_is_more_than_fourfold(pairs: list[tuple[float, float]]) -> None:
    ratio, delay = SeenRatio(), SeenDelay()
    for now_s, (predicted_s, seen_s) in enumerate(pairs):
        ratio.saw(predicted_s, seen_s)
        delay.saw(predicted_s, seen_s, float(now_s))
        assert 0.25 <= ratio.factor <= 4.0
        assert 0.0 <= delay.delay_s(float(now_s)) <= 1e3
