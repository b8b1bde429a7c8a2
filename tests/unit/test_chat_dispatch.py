"""Which instances get a chat's sequence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages.cluster import LanguageRole
from common.policies.language.chat_dispatch import ChatDispatch
from common.policies.language.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    Event,
    GatewayHolds,
    GatewayLost,
    InstanceDraining,
    InstanceJoined,
    InstanceLost,
    RolesChanged,
    RouteSequence,
)
from common.policies.language.chat_rule import CHAT_RULES, ChatRule
from common.policies.language.flip import ChatLoad, InstanceLoad
from common.policies.language.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.language.routing import Costs, Pull
from common.policies.language.routing_rules import make_rule

PREFILL, DECODE = (LanguageRole.PREFILL,), (LanguageRole.DECODE,)
FUSED = PREFILL + DECODE


def arrived(
    name: str, prompt: int = 10, most: int = 100, avoid: tuple[str, ...] = (), created_s: float = 0.0
) -> ChatArrived:
    return ChatArrived(name, "gateway-0", created_s, prompt, most, avoid)


def cluster(rule: str | None = None, **roles: tuple[LanguageRole, ...]) -> ChatDispatch:
    """``rule``: it prefills 100 tokens a second, and sends what 1,000 left behind."""
    costs = Costs(RateCost(100.0), DecodeCost(0.0, 0.01, 0.0), LinkCost(1000.0, 0.0), 1, 16)
    dispatch = ChatDispatch(first_epoch := 100)
    if rule is not None:
        dispatch.rule = ChatRule(make_rule(rule, CHAT_RULES), costs)
    for name, own in roles.items():
        dispatch.handle(InstanceJoined(name, own), 0.0)
    assert dispatch.next_epoch == first_epoch
    return dispatch


def route(dispatch: ChatDispatch, event: ChatArrived, now_s: float = 0.0) -> tuple[str, str]:
    (decision,) = dispatch.handle(event, now_s)
    assert decision.request_id == event.request_id
    assert decision.reason
    return decision.prefill, decision.decode


def test_the_least_prompt_tokens_and_the_least_answer_tokens() -> None:
    dispatch = cluster(p0=PREFILL, p1=PREFILL, d0=DECODE, d1=DECODE)
    assert route(dispatch, arrived("long", prompt=500, most=10)) == ("p0", "d0")
    assert route(dispatch, arrived("short", prompt=5, most=900)) == ("p1", "d1")
    assert route(dispatch, arrived("third")) == ("p1", "d0")
    assert dispatch.load("p0") == (500, 0)
    assert dispatch.load("d0") == (0, 110)


def test_a_change_of_roles_keeps_what_runs_there_and_brings_nothing_new() -> None:
    dispatch = cluster(p0=PREFILL, x=PREFILL, d0=DECODE)
    assert route(dispatch, arrived("a")) == ("p0", "d0")
    assert route(dispatch, arrived("b")) == ("x", "d0")
    dispatch.handle(RolesChanged("x", DECODE), 0.0)
    assert dispatch.load("x") == (10, 0)
    assert [route(dispatch, arrived(name)) for name in "cd"] == [("p0", "x"), ("p0", "x")]
    dispatch.handle(ChatPrefilled("b", 101), 0.0)
    assert dispatch.load("x") == (0, 200)
    dispatch.handle(RolesChanged("x", PREFILL), 0.0)
    assert route(dispatch, arrived("e")) == ("x", "d0") and dispatch.load("x") == (10, 200)
    assert dispatch.handle(RolesChanged("unknown", FUSED), 0.0) == []


def test_what_flips_go_by() -> None:
    """A prompt waits beside another one, and after it until the second token comes."""
    dispatch = cluster(p0=PREFILL, p1=PREFILL, d0=DECODE, d1=DECODE, fused=FUSED)
    dispatch.handle(InstanceDraining("fused"), 0.0)
    dispatch.handle(InstanceDraining("p1"), 0.0)
    for name in "abc":
        route(dispatch, arrived(name, most=10))
    dispatch.handle(ChatPrefilled("a", 100, "d0"), 0.0)
    p0, d0, d1 = dispatch.loads("d1")
    assert p0 == InstanceLoad("p0", LanguageRole.PREFILL, 1, True, running=1, prefilled_tokens=10)
    assert (d0.role, d0.waiting, d0.busy, d0.running, d0.flipping) == (LanguageRole.DECODE, 1, True, 0, False)
    assert d1.flipping and not d1.busy and d0.room > 1000
    assert dispatch.chats() == ChatLoad(30, 30, to_prefill=20, to_decode=30, decoded_tokens=0)
    dispatch.handle(ChatPrefilled("a", 100, "d0", decoding=True), 0.0)
    d0 = dispatch.loads()[1]
    assert (d0.waiting, d0.busy, d0.running) == (0, True, 1)
    assert dispatch.chats() == ChatLoad(30, 30, to_prefill=20, to_decode=20, decoded_tokens=5)
    dispatch.handle(ChatEnded("a", 100), 0.0)
    assert dispatch.chats().decoded_tokens == 10
    assert dispatch.decoding(but="d0") == ["d1"]


def test_what_is_given_to_nobody_yet_waits_at_all_that_decode() -> None:
    dispatch = cluster(p0=PREFILL, d0=DECODE, d1=DECODE)
    dispatch.dispatched = True
    for place, name in enumerate("abc"):
        dispatch.handle(arrived(name), 0.0)
        dispatch.handle(ChatPrefilled(name, 100 + place), 0.0)
    assert [load.waiting for load in dispatch.loads()] == [0, 2, 1]


def test_a_fused_instance_keeps_what_it_prefills() -> None:
    dispatch = cluster(f0=FUSED, f1=FUSED)
    assert route(dispatch, arrived("a", prompt=10)) == ("f0", "f0")
    assert route(dispatch, arrived("b", prompt=5)) == ("f1", "f1")
    dispatch.handle(ChatPrefilled("a", 100), 0.0)
    dispatch.handle(ChatPrefilled("b", 101), 0.0)
    # Nothing is left to prefill anywhere, so the answers decide.
    dispatch.handle(ChatEnded("b", 101), 0.0)
    assert route(dispatch, arrived("c")) == ("f1", "f1")


def test_the_first_token_and_the_end_take_the_load_away() -> None:
    dispatch = cluster(p0=PREFILL, d0=DECODE)
    route(dispatch, arrived("a"))
    dispatch.handle(ChatPrefilled("a", 99), 0.0)
    assert dispatch.load("p0") == (10, 0)
    dispatch.handle(ChatPrefilled("a", 100), 0.0)
    assert (dispatch.load("p0"), dispatch.load("d0")) == ((0, 0), (0, 100))
    dispatch.handle(ChatEnded("a", 99), 0.0)
    assert dispatch.load("d0") == (0, 100)
    dispatch.handle(ChatEnded("a", 100), 0.0)
    assert dispatch.load("d0") == (0, 0)


def test_what_is_to_be_generated_counts_where_it_is_generated_now() -> None:
    dispatch = cluster(p0=PREFILL, d0=DECODE, d1=DECODE)
    route(dispatch, arrived("a"))
    dispatch.handle(ChatPrefilled("a", 100, "d1"), 0.0)
    assert (dispatch.load("p0"), dispatch.load("d0"), dispatch.load("d1")) == ((0, 0), (0, 0), (0, 100))
    dispatch.handle(ChatPrefilled("a", 100), 0.0)
    assert dispatch.load("d1") == (0, 100)
    dispatch.handle(InstanceLost("d1"), 0.0)
    dispatch.handle(InstanceJoined("d1", DECODE), 0.0)
    dispatch.handle(ChatPrefilled("a", 100, "d0"), 0.0)
    assert (dispatch.load("d0"), dispatch.load("d1")) == ((0, 100), (0, 0))
    # An instance of which nothing is known yet: it bears what comes to it once it is there.
    dispatch.handle(ChatPrefilled("a", 100, "d2"), 0.0)
    dispatch.handle(InstanceJoined("d2", DECODE), 0.0)
    dispatch.handle(ChatEnded("a", 100), 0.0)
    assert (dispatch.load("d0"), dispatch.load("d2")) == ((0, 0), (0, 0))


def test_where_prefill_instances_choose_nobody_is_named() -> None:
    for rule in (None, "cost"):
        dispatch = cluster(rule, p0=PREFILL, d0=DECODE)
        dispatch.dispatched = True
        assert route(dispatch, arrived("a")) == ("p0", "")
        assert dispatch.load("d0") == (0, 0)
        dispatch.handle(ChatPrefilled("a", 100), 0.0)
        assert (dispatch.load("p0"), dispatch.load("d0")) == ((0, 0), (0, 0))
        dispatch.handle(ChatPrefilled("a", 100, "d0"), 0.0)
        assert dispatch.load("d0") == (0, 100)
        # Who does both keeps what it prefills.
        dispatch.handle(InstanceLost("p0"), 0.0)
        dispatch.handle(InstanceJoined("f0", FUSED), 0.0)
        assert route(dispatch, arrived("b")) == ("f0", "f0")
        # Somebody must be there all the same.
    nobody = cluster(p0=PREFILL)
    nobody.dispatched = True
    assert nobody.handle(arrived("c"), 0.0) == []


def test_what_is_avoided_or_draining_is_taken_only_where_there_is_no_other() -> None:
    dispatch = cluster(f0=FUSED, f1=FUSED)
    assert route(dispatch, arrived("a", avoid=("f0",))) == ("f1", "f1")
    assert route(dispatch, arrived("b", avoid=("f0", "f1"))) == ("f0", "f0")
    dispatch.handle(InstanceDraining("f0"), 0.0)
    assert route(dispatch, arrived("c", avoid=("f1",))) == ("f1", "f1")
    dispatch.handle(InstanceDraining("f1"), 0.0)
    assert dispatch.handle(arrived("d"), 0.0) == []


def test_sequences_wait_oldest_first_until_an_instance_joins() -> None:
    dispatch = cluster(p0=PREFILL)
    for name, created_s in (("c", 3.0), ("b", 2.0), ("a", 1.0)):
        assert dispatch.handle(arrived(name, created_s=created_s), 0.0) == []
    # Asking again changes nothing.
    assert dispatch.handle(arrived("c", created_s=3.0), 0.0) == []
    assert dispatch.handle(ChatEnded("b", None), 0.0) == []
    assert dispatch.waiting == 2
    decisions = dispatch.handle(InstanceJoined("d0", DECODE), 0.0)
    assert [(decision.request_id, decision.epoch) for decision in decisions] == [("a", 100), ("c", 101)]


def test_a_new_route_takes_the_place_of_the_former() -> None:
    dispatch = cluster(f0=FUSED, f1=FUSED)
    route(dispatch, arrived("a", prompt=10))
    assert route(dispatch, arrived("a", prompt=12, avoid=("f0",))) == ("f1", "f1")
    assert (dispatch.load("f0"), dispatch.load("f1")) == ((0, 0), (12, 100))
    dispatch.handle(ChatEnded("a", 100), 0.0)
    assert dispatch.load("f1") == (12, 100)


def test_an_instance_that_comes_back_bears_nothing() -> None:
    dispatch = cluster(f0=FUSED)
    route(dispatch, arrived("a"))
    dispatch.handle(InstanceLost("f0"), 0.0)
    dispatch.handle(InstanceJoined("f0", FUSED), 0.0)
    dispatch.handle(ChatEnded("a", 100), 0.0)
    assert dispatch.load("f0") == (0, 0)


def test_a_lost_gateways_sequences_are_forgotten() -> None:
    dispatch = cluster(f0=FUSED)
    route(dispatch, arrived("a"))
    dispatch.handle(InstanceDraining("f0"), 0.0)
    dispatch.handle(arrived("b"), 0.0)
    dispatch.handle(GatewayLost("gateway-0"), 0.0)
    assert (dispatch.load("f0"), dispatch.waiting) == ((0, 0), 0)


def test_what_a_gateway_does_not_name_is_over_but_for_routes_on_their_way() -> None:
    dispatch = cluster(f0=FUSED)
    for name, now_s in (("ended", 0.0), ("runs", 0.0), ("on its way", 15.0)):
        dispatch.handle(arrived(name, prompt=10, most=100), now_s)
    dispatch.handle(GatewayHolds("gateway-1", frozenset()), 20.0)
    assert dispatch.load("f0") == (30, 300)
    dispatch.handle(GatewayHolds("gateway-0", frozenset({101})), 20.0)
    assert dispatch.load("f0") == (20, 200)
    dispatch.handle(GatewayHolds("gateway-0", frozenset({101})), 30.0)
    assert dispatch.load("f0") == (10, 100)


_NAMES = st.sampled_from(["f0", "p0", "d0", "d1"])
_REQUESTS = st.sampled_from(["a", "b", "c", "d"])
_ROLES = {"f": FUSED, "p": PREFILL, "d": DECODE}
_EVENTS = st.one_of(
    _NAMES.map(lambda name: InstanceJoined(name, _ROLES[name[0]])),
    _NAMES.map(InstanceDraining),
    _NAMES.map(InstanceLost),
    st.builds(arrived, _REQUESTS, st.integers(1, 50), st.integers(1, 50), st.tuples(_NAMES)),
    st.builds(ChatPrefilled, _REQUESTS, st.integers(100, 120), st.just("") | _NAMES),
    st.builds(ChatEnded, _REQUESTS, st.none() | st.integers(100, 120)),
    st.just(GatewayLost("gateway-0")),
    st.builds(GatewayHolds, st.just("gateway-0"), st.frozensets(st.integers(100, 120))),
)


@settings(deadline=None)
@given(happening=st.lists(_EVENTS, max_size=40))
def test_whatever_happens_load_is_never_negative_and_ends_at_nothing(happening: list[Event]) -> None:
    dispatch = ChatDispatch(100)
    there: dict[str, bool] = {}
    epochs = [99]
    for now_s, event in enumerate(happening):
        decisions: list[RouteSequence] = dispatch.handle(event, now_s)
        match event:
            case InstanceJoined(name):
                there[name] = True
            case InstanceDraining(name) if name in there:
                there[name] = False
            case InstanceLost(name):
                there.pop(name, None)
        for decision in decisions:
            assert there[decision.prefill]
            assert there[decision.decode]
            assert decision.epoch > epochs[-1]
            epochs.append(decision.epoch)
        assert all(tokens >= 0 for name in there for tokens in dispatch.load(name))
    for request_id in "abcd":
        dispatch.handle(ChatEnded(request_id, None), len(happening))
    assert all(dispatch.load(name) == (0, 0) for name in there)
    assert dispatch.waiting == 0


def test_a_prompt_goes_where_what_waits_and_what_it_lacks_are_least() -> None:
    dispatch = cluster(p0=PREFILL, p1=PREFILL, d0=DECODE)
    known = ChatArrived("known", "gateway-0", 0.0, 500, 10, cached={"p1": 480})
    assert route(dispatch, known) == ("p1", "d0")
    assert dispatch.load("p1") == (20, 0)
    # All of it is there, but the last token is always computed.
    assert route(dispatch, ChatArrived("whole", "gateway-0", 0.0, 480, 10, cached={"p1": 480})) == ("p1", "d0")
    assert dispatch.load("p1") == (21, 0)
    dispatch.handle(arrived("long", prompt=1000), 0.0)
    assert dispatch.load("p0") == (1000, 0)
    # What it saves is not worth the wait.
    assert route(dispatch, ChatArrived("waits", "gateway-0", 0.0, 500, 10, cached={"p0": 480})) == ("p1", "d0")
    for name, epoch in (("known", 100), ("whole", 101), ("long", 102), ("waits", 103)):
        dispatch.handle(ChatEnded(name, epoch), 0.0)
    assert dispatch.load("p0") == dispatch.load("p1") == (0, 0)


def test_by_cost_what_is_elsewhere_is_pulled_where_that_pays() -> None:
    dispatch = cluster("cost", f0=FUSED, f1=FUSED)
    # Its 20 tokens take less than all of it elsewhere.
    near = ChatArrived("near", "gateway-0", 0.0, 500, 10, cached={"f1": 480})
    (decision,) = dispatch.handle(near, 0.0)
    assert (decision.prefill, decision.decode, decision.pull) == ("f1", "f1", None)
    dispatch.handle(arrived("long", prompt=1000), 0.0)
    dispatch.handle(ChatArrived("longer", "gateway-0", 0.0, 2000, 10, cached={"f1": 480}), 0.0)
    assert dispatch.load("f0") == (1000, 100) and dispatch.load("f1") == (1540, 20)
    (decision,) = dispatch.handle(ChatArrived("far", "gateway-0", 0.0, 500, 10, cached={"f1": 480}), 0.0)
    assert (decision.prefill, decision.pull) == ("f0", Pull("f1", 0, 480))
    assert dispatch.load("f0") == (1020, 110)
    # What has its first token, and what has ended, bears on nobody.
    dispatch.handle(ChatPrefilled("longer", 102), 0.0)
    (decision,) = dispatch.handle(arrived("next", prompt=500), 0.0)
    assert decision.prefill == "f1"
    for name in ("near", "long", "longer", "far", "next"):
        dispatch.handle(ChatEnded(name, None), 0.0)
    assert dispatch.load("f0") == dispatch.load("f1") == (0, 0)


def test_by_session_a_conversation_stays_where_it_was() -> None:
    dispatch = cluster("session", f0=FUSED, f1=FUSED)
    turns = [ChatArrived(f"turn-{n}", "gateway-0", 0.0, 100, 10, conversation="one") for n in range(3)]
    assert [route(dispatch, turn)[0] for turn in turns] == ["f0", "f0", "f0"]
    # What has no conversation is one of its own.
    assert [route(dispatch, arrived(name, prompt=200))[0] for name in "ab"] == ["f1", "f1"]


@pytest.mark.parametrize("rule", CHAT_RULES)
def test_every_rule_routes_and_is_not_given_what_drains_or_is_to_be_avoided(rule: str) -> None:
    dispatch = cluster(rule, p0=PREFILL, p1=PREFILL, d0=DECODE, f0=FUSED, f1=FUSED)
    dispatch.handle(InstanceDraining("f1"), 0.0)
    for number in range(20):
        chosen = route(dispatch, arrived(f"chat-{number}", prompt=50 + number, avoid=("p1",)))
        # By least delay who could decode too may hand over all the same.
        assert chosen in {("p0", "d0"), ("p0", "f0"), ("f0", "f0")} | (
            {("f0", "d0")} if rule == "least_delay" else set()
        )
    dispatch.handle(GatewayLost("gateway-0"), 0.0)
    assert all(dispatch.load(name) == (0, 0) for name in ("p0", "d0", "f0"))
