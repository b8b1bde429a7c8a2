"""The scheduler's view of what instances have, over a line that loses, repeats and reorders."""

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.prompt_index import (
    AskSnapshot,
    IndexChange,
    IndexPublisher,
    IndexSnapshot,
    PromptIndex,
    Viewed,
)

BLOCK = 4
Told = IndexChange | IndexSnapshot


def prompt(*blocks: int) -> bytes:
    return b"".join(bytes([block]) * BLOCK for block in blocks)


def tell(view: PromptIndex, told: Iterable[Told]) -> list[AskSnapshot]:
    return [asked for one in told for asked in view.handle(one)]


def test_what_is_published_is_known_and_what_is_evicted_is_not() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    assert tell(view, [instance.inserted(prompt(1, 2, 3)), instance.inserted(prompt(1, 4))]) == []
    assert view.match(prompt(1, 2, 3, 9), 0.0) == {"a": 3}
    assert tell(view, [instance.evicted(prompt(1, 2, 3), 1)]) == []
    assert view.match(prompt(1, 2, 3), 0.0) == {"a": 1}
    assert view.match(prompt(1, 4), 0.0) == {"a": 2}
    assert view.repairs == 0


def test_a_gap_is_repaired_and_what_came_meanwhile_counts() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    first, lost, third = (instance.inserted(prompt(block)) for block in (1, 2, 3))
    asked = tell(view, [first, third])
    assert [one.instance for one in asked] == ["a"]
    snapshot = instance.snapshot()
    later = instance.inserted(prompt(4))
    assert tell(view, [later, lost, snapshot]) == []
    assert [view.match(prompt(block), 0.0) for block in (1, 2, 3, 4)] == [{"a": 1}] * 4
    assert view.repairs == 1


def test_a_restart_forgets_what_the_former_life_had() -> None:
    view = PromptIndex(BLOCK)
    former, anew = IndexPublisher("a", 1, BLOCK), IndexPublisher("a", 2, BLOCK)
    old = former.inserted(prompt(1))
    assert tell(view, [old, anew.inserted(prompt(2)), former.inserted(prompt(3))]) == []
    assert view.match(prompt(1), 0.0) == {}
    assert view.match(prompt(2), 0.0) == {"a": 1}
    assert view.match(prompt(3), 0.0) == {}


def test_a_difference_without_a_gap_is_noticed() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    told = instance.inserted(prompt(1, 2))
    garbled = IndexChange("a", 1, told.number, prompt(1, 3), None, told.after)
    (asked,) = tell(view, [garbled])
    assert "something else" in asked.reason
    assert tell(view, [instance.snapshot()]) == []
    assert view.match(prompt(1, 2), 0.0) == {"a": 2}


def test_an_instance_that_was_not_known_may_begin_with_a_snapshot() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    instance.inserted(prompt(1, 2))
    assert tell(view, [instance.snapshot(), instance.inserted(prompt(3))]) == []
    assert view.match(prompt(1, 2), 0.0) == {"a": 2}
    assert view.match(prompt(3), 0.0) == {"a": 1}


def test_a_view_tells_how_far_it_is() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 7, BLOCK)
    first, _, third = (instance.inserted(prompt(block, block + 1)) for block in (1, 3, 5))
    assert view.views() == []
    tell(view, [first])
    assert view.views() == [Viewed("a", 7, 1, False, first.after)]
    tell(view, [third])
    assert view.views() == [Viewed("a", 7, 1, True, first.after)]
    tell(view, [instance.snapshot()])
    assert view.views() == [Viewed("a", 7, 3, False, third.after)]
    view.forget("a")
    assert view.views() == []


def test_expectations_die_of_age_unless_renewed() -> None:
    view = PromptIndex(BLOCK, ttl_s=60.0)
    view.expect("a", prompt(1, 2))
    view.expect("b", prompt(1))
    assert view.match(prompt(1, 2), 30.0) == {"a": 2, "b": 1}
    view.expect("b", prompt(1))
    assert view.match(prompt(1, 2), 60.0) == {"b": 1}
    assert view.match(prompt(1, 2), 90.0) == {}


def test_evictions_end_expectations_too() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    view.expect("a", prompt(1, 2))
    tell(view, [instance.inserted(prompt(1, 2)), instance.evicted(prompt(1, 2), 0)])
    assert view.match(prompt(1, 2), 0.0) == {}


def test_an_instance_that_is_gone_has_nothing() -> None:
    view, instance = PromptIndex(BLOCK), IndexPublisher("a", 1, BLOCK)
    tell(view, [instance.inserted(prompt(1))])
    view.expect("a", prompt(2))
    view.forget("a")
    assert view.match(prompt(1), 0.0) == view.match(prompt(2), 0.0) == {}


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(lambda blocks: prompt(*blocks))
# What the instance does, and how many times the line delivers it (0: lost), before or after the next one.
steps = st.tuples(st.sampled_from(["insert", "evict", "restart"]), prompts, st.integers(0, 2), st.booleans())


@settings(deadline=None)
@given(st.lists(steps, max_size=30))
def test_whatever_the_line_did_the_view_is_right_after_the_next_change_and_its_repair(
    history: list[tuple[str, bytes, int, bool]],
) -> None:
    view, life = PromptIndex(BLOCK), 1
    instance = IndexPublisher("a", life, BLOCK)
    late: list[IndexChange] = []
    asked: list[AskSnapshot] = []
    for what, tokens, times, delayed in history:
        if what == "restart":
            life += 1
            instance = IndexPublisher("a", life, BLOCK)
            continue
        change = instance.inserted(tokens) if what == "insert" else instance.evicted(tokens, 0)
        if delayed:
            late += [change] * times
            continue
        asked += tell(view, [*[change] * times, *late])
        late = []
    asked += tell(view, [instance.inserted(prompt(0))])
    if asked:
        again = tell(view, [instance.snapshot()])
        if again:
            assert tell(view, [instance.snapshot()]) == []
    assert view.holding("a") == instance.snapshot().after
