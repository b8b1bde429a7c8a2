"""Who goes on with a sequence (TetriInfer, section 3.3.4), on loads written out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policies.language.decode_dispatch import (
    ChooseDecode,
    DecodeDispatch,
    DecodeLoad,
    DelayCost,
    DispatchRule,
    HeldLongEnough,
    InstanceGone,
    LoadsBroadcast,
    RatioMode,
    SequenceBegan,
    SequenceGone,
    SequenceHandedOver,
)
from common.policies.language.length_prediction import LengthRange

LIGHT, HEAVY = LengthRange(0, 200, "test"), LengthRange(400, 600, "test")


def _began(
    name: str, predicted: LengthRange = HEAVY, draws: tuple[float, float] = (0.0, 0.0), **more: object
) -> SequenceBegan:
    return SequenceBegan(name, 160, predicted, draws, **more)  # type: ignore[arg-type]


def _told(*loads: tuple[str, int, int, int], **options: object) -> DecodeDispatch:
    dispatch = DecodeDispatch(**options)  # type: ignore[arg-type]
    dispatch.handle(LoadsBroadcast(tuple(DecodeLoad(*load) for load in loads)))
    return dispatch


def _chosen(dispatch: DecodeDispatch, began: SequenceBegan) -> str:
    (choice,) = dispatch.handle(began)
    assert choice.reason
    return choice.instance


def test_alpha_has_room_for_prompt_and_predicted_answer() -> None:
    """160 + 400 tokens are 35 blocks; the upper end, 160 + 600, is 48."""
    loads = (("d0", 34, 0, 9), ("d1", 35, 5, 1), ("d2", 40, 6, 1))
    assert _chosen(_told(*loads), _began("a")) == "d1"
    with_high = _told(*loads, room_for_high=True)
    assert with_high.handle(_began("a")) == [] and with_high.held == 1


def test_a_heavy_one_goes_where_fewest_are_heavy_beside_light_ones() -> None:
    dispatch = _told(("d0", 900, 4, 4), ("d1", 900, 5, 10))
    assert _chosen(dispatch, _began("a")) == "d1"  # 6 / 10 against 5 / 4


def test_of_more_than_two_only_the_drawn_ones_count() -> None:
    loads = (("d0", 900, 9, 1), ("d1", 900, 0, 9), ("d2", 900, 8, 1))
    assert _chosen(_told(*loads), _began("a", draws=(0.0, 0.99))) == "d2"  # d0 and d2 were drawn
    assert _chosen(_told(*loads), _began("a", draws=(0.5, 0.0))) == "d1"


def test_the_readings_of_the_ratio() -> None:
    """Two instances, 3:1 and 1:1, and one more light one."""
    loads = (("d0", 500, 3, 1), ("d1", 900, 1, 1))
    chosen = {mode: _chosen(_told(*loads, ratio_mode=mode), _began("a", LIGHT)) for mode in RatioMode}
    # After: 3/2 against 1/2. Average: (3/2 + 1)/2 against (3 + 1/2)/2. As they are: 3 against 1. By kind: free memory.
    assert chosen == {RatioMode.AFTER: "d1", RatioMode.AVERAGE: "d0", RatioMode.LITERAL: "d1", RatioMode.BY_KIND: "d1"}


def test_ties_go_to_the_freest_and_then_to_the_first() -> None:
    assert _chosen(_told(("d0", 500, 1, 1), ("d1", 600, 1, 1)), _began("a")) == "d1"
    assert _chosen(_told(("d0", 500, 1, 1), ("d1", 500, 1, 1)), _began("a")) == "d0"


def test_what_was_sent_is_counted_until_a_broadcast_has_it() -> None:
    loads = (("d0", 500, 0, 1), ("d1", 500, 0, 1))
    dispatch = _told(*loads)
    assert [_chosen(dispatch, _began(name)) for name in "abc"] == ["d0", "d1", "d0"]
    herds = _told(*loads, counts_pending=False)
    assert [_chosen(herds, _began(name)) for name in "abc"] == ["d0", "d0", "d0"]
    # A broadcast that comes before the hand-over does not know of a yet, the one after it does.
    broadcast = LoadsBroadcast((DecodeLoad("d0", 500, 0, 1), DecodeLoad("d1", 450, 0, 1)))
    fresh = _told(*loads)
    assert _chosen(fresh, _began("a")) == "d0"
    fresh.handle(broadcast)
    assert _chosen(fresh, _began("b")) == "d1"
    for name in "ab":
        fresh.handle(SequenceHandedOver(name))
    fresh.handle(broadcast)
    assert _chosen(fresh, _began("c")) == "d0"


def test_with_no_alpha_a_sequence_waits_for_a_broadcast() -> None:
    dispatch = _told(("d0", 3, 0, 0))
    assert dispatch.handle(_began("a")) == [] and dispatch.handle(_began("b")) == []
    dispatch.handle(SequenceGone("a"))
    (choice,) = dispatch.handle(LoadsBroadcast((DecodeLoad("d0", 40, 0, 0),)))
    assert isinstance(choice, ChooseDecode) and choice.sequence == "b" and dispatch.held == 0
    beta = _told(("d0", 3, 0, 0), ("d1", 5, 9, 0), holds=False)
    assert _chosen(beta, _began("a")) == "d1"


def test_nobody_is_chosen_before_the_first_broadcast() -> None:
    dispatch = DecodeDispatch()
    assert dispatch.handle(_began("a")) == [] and dispatch.held == 1


def test_the_papers_rivals() -> None:
    loads = (("d0", 0, 9, 0), ("d1", 900, 0, 0), ("d2", 900, 0, 3))
    assert _chosen(_told(*loads, rule=DispatchRule.RANDOM), _began("a", draws=(0.4, 0.0))) == "d1"
    imbalance = _told(*loads, rule=DispatchRule.IMBALANCE)
    assert [_chosen(imbalance, _began(*one)) for one in (("a", HEAVY), ("b", LIGHT))] == ["d0", "d1"]


def test_a_prefix_counts_as_the_milliseconds_of_its_transfer() -> None:
    """160 tokens to move cost 16 ms; 500 tokens beside one more neighbour 500 * 2 * 0.01 = 10 ms."""
    cost = DelayCost(sequence_ms=0.01, heavy_ms=0.0, transfer_token_ms=0.1)
    loads = (("d0", 900, 1, 0), ("d1", 900, 2, 0))
    rule = DispatchRule.LEAST_DELAY
    assert _chosen(_told(*loads, rule=rule, delay=cost), _began("a")) == "d0"
    assert _chosen(_told(*loads, rule=rule, delay=cost), _began("a", prefix_tokens={"d1": 160})) == "d1"
    assert _chosen(_told(*loads, rule=rule, delay=cost), _began("a", prefix_tokens={"d1": 80})) == "d0"
    with pytest.raises(ValueError, match="what delays cost"):
        DecodeDispatch(rule)


@settings(max_examples=100, deadline=None)
@given(
    loads=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    sequences=st.lists(
        st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)), max_size=20
    ),
)
def test_nobody_is_sent_where_there_is_no_room(
    loads: list[tuple[int, int, int]], sequences: list[tuple[bool, float, float]]
) -> None:
    dispatch = _told(*((f"d{number}", *load) for number, load in enumerate(loads)))
    free = {f"d{number}": load[0] for number, load in enumerate(loads)}
    held = 0
    for number, (heavy, *draws) in enumerate(sequences):
        choices = dispatch.handle(_began(str(number), HEAVY if heavy else LIGHT, (draws[0], draws[1])))
        for choice in choices:
            free[choice.instance] -= 35 if heavy else 10
        held += not choices
    assert all(blocks >= 0 for blocks in free.values()) and dispatch.held == held


def test_what_was_held_long_enough_goes_to_the_freest() -> None:
    dispatch = _told(("d0", 3, 0, 0), ("d1", 9, 5, 5))
    assert dispatch.handle(_began("a")) == [] and dispatch.held == 1
    (choice,) = dispatch.handle(HeldLongEnough("a"))
    assert (choice.sequence, choice.instance, dispatch.held) == ("a", "d1", 0)
    assert dispatch.handle(HeldLongEnough("a")) == []
    # Where nobody is known, it is held for as long as it is wanted.
    unknown = DecodeDispatch()
    assert unknown.handle(_began("b")) == unknown.handle(HeldLongEnough("b")) == [] and unknown.held == 1


def test_who_did_not_take_it_is_avoided_where_there_is_another() -> None:
    loads = (("d0", 900, 0, 0), ("d1", 900, 9, 1))
    assert _chosen(_told(*loads), _began("a", avoid=("d0",))) == "d1"
    assert _chosen(_told(*loads), _began("a", avoid=("d0", "d1"))) == "d0"


def test_who_is_gone_gets_nothing_until_it_is_told_of_anew() -> None:
    dispatch = _told(("d0", 900, 0, 0), ("d1", 900, 9, 1))
    dispatch.handle(InstanceGone("d0"))
    assert _chosen(dispatch, _began("a")) == "d1"
    dispatch.handle(LoadsBroadcast((DecodeLoad("d0", 900, 0, 0), DecodeLoad("d1", 900, 9, 1))))
    assert _chosen(dispatch, _began("b")) == "d0"
