"""Roles by least delay, on clusters to reckon by hand. A prompt token takes 1 ms, a decoding pass 20 ms."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.least_delay import (
    ChooseInstances,
    DelayModel,
    InstanceJoined,
    InstanceLeft,
    LeastDelay,
    SequenceCame,
    SequenceEnded,
    SequencePrefilled,
)
from common.policies.length_prediction import LengthRange

MODEL = DelayModel(0.001, 512, 0.020, 0.001, 0.000001, 0.0001, 50_000)


def _cluster(count: int, model: DelayModel = MODEL) -> LeastDelay:
    policy = LeastDelay(model)
    for number in range(count):
        policy.handle(InstanceJoined(f"l{number}"), 0.0)
    return policy


def _came(name: str, prompt: int = 500, answer: int = 100, **more: object) -> SequenceCame:
    return SequenceCame(name, prompt, LengthRange(answer, answer + 1, "test"), **more)  # type: ignore[arg-type]


def _route(policy: LeastDelay, came: SequenceCame, now_s: float = 0.0) -> ChooseInstances:
    (chosen,) = policy.handle(came, now_s)
    assert chosen.reason
    return chosen


def test_a_burst_is_spread_and_each_stays_where_it_was_prefilled() -> None:
    policy = _cluster(3)
    routes = [_route(policy, _came(name)) for name in "abc"]
    assert [(route.prefill, route.decode) for route in routes] == [(f"l{n}", f"l{n}") for n in range(3)]


def test_a_prompt_goes_where_it_stalls_nobody() -> None:
    """At l0 twenty sequences decode: 2 s of prompt would cost each of them most of that."""
    policy = _cluster(2)
    policy.handle(InstanceLeft("l1"), 0.0)
    for number in range(20):
        _route(policy, _came(f"running-{number}", prompt=10))
        policy.handle(SequencePrefilled(f"running-{number}"), 0.0)
    policy.handle(InstanceJoined("l1"), 0.0)
    assert _route(policy, _came("new", prompt=2000)).prefill == "l1"


def test_prefill_and_decode_part_when_one_place_is_busy_with_prompts() -> None:
    policy = _cluster(2)
    policy.handle(InstanceLeft("l1"), 0.0)
    for number in range(10):
        _route(policy, _came(f"prompt-{number}", prompt=2000, answer=1))
    policy.handle(InstanceJoined("l1"), 0.0)
    held_there = _route(policy, _came("new", prompt=1000, answer=500, prefix_tokens={"l0": 999}))
    assert (held_there.prefill, held_there.decode) == ("l0", "l1") and held_there.cached_tokens == 999


def test_a_prefix_is_worth_the_time_it_saves_and_no_more() -> None:
    policy = _cluster(2)
    _route(policy, _came("queued", prompt=600, answer=1))  # at l0
    assert _route(policy, _came("a", prompt=1000, prefix_tokens={"l0": 900})).prefill == "l0"
    policy.handle(SequenceEnded("a"), 0.0)
    assert _route(policy, _came("b", prompt=1000, prefix_tokens={"l0": 100})).prefill == "l1"


def test_what_ends_or_leaves_is_forgotten() -> None:
    policy = _cluster(2)
    assert _route(policy, _came("a")).prefill == "l0"
    policy.handle(SequenceEnded("a"), 0.0)
    policy.handle(SequenceEnded("a"), 0.0)
    assert _route(policy, _came("b"), 1000.0).prefill == "l0"
    policy.handle(InstanceLeft("l0"), 1000.0)
    policy.handle(SequencePrefilled("b"), 1000.0)
    assert _route(policy, _came("c"), 1000.0).prefill == "l1"


def test_who_comes_back_is_not_charged_for_what_it_had_before() -> None:
    policy = _cluster(1)
    for name in "abc":
        _route(policy, _came(name))
    policy.handle(InstanceLeft("l0"), 0.0)
    policy.handle(InstanceJoined("l0"), 0.0)
    fresh = _cluster(1)
    for name in "abc":
        policy.handle(SequencePrefilled(name), 1.0)
        policy.handle(SequenceEnded(name), 1.0)
    assert _route(policy, _came("new"), 1.0) == _route(fresh, _came("new"), 1.0)


def test_without_an_instance_a_sequence_waits() -> None:
    policy = LeastDelay(MODEL)
    assert policy.handle(_came("a"), 0.0) == []
    assert policy.handle(_came("gone"), 0.0) == [] and policy.handle(SequenceEnded("gone"), 0.0) == []
    (chosen,) = policy.handle(InstanceJoined("l0"), 1.0)
    assert chosen.sequence == "a"


@settings(max_examples=50, deadline=None)
@given(events=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_books_are_empty_when_all_is_over(events: list[tuple[int, int]]) -> None:
    """Whatever order things happen in: a cluster on which everything has ended routes like a fresh one."""
    policy = _cluster(2)
    for number, (sequence, what) in enumerate(events):
        name, now_s = str(sequence), float(number)
        if what < 2:
            assert len(policy.handle(_came(name, prompt=100 + 300 * what), now_s)) == 1
        else:
            policy.handle(SequencePrefilled(name) if what == 2 else SequenceEnded(name), now_s)
    for sequence in range(6):
        policy.handle(SequenceEnded(str(sequence)), 100.0)
    late_s = 1e6  # the share of prefill is forgotten
    fresh = _cluster(2)
    for name in "abcd":
        assert _route(policy, _came(name), late_s) == _route(fresh, _came(name), late_s)
