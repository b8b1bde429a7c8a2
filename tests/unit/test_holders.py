"""Whom a gateway asks and cancels: whoever may have a sequence, as it is handed from one to the next."""

import pytest

from common.language.handed_on import HandedOn
from gateway.chat.holders import Holders


def test_a_route_names_the_first_two() -> None:
    assert Holders("p", "d").names == ("p", "d")
    assert Holders("f", "f").names == ("f",)
    nobody_chosen = Holders("p", "")
    assert (nobody_chosen.names, nobody_chosen.decode) == (("p",), "")


def test_whoever_speaks_has_it_and_nobody_before() -> None:
    holders = Holders("p", "d")
    holders.spoke("p")
    assert holders.names == ("p", "d") and not holders.decoding
    holders.spoke("d")
    assert holders.names == ("d",) and holders.decoding
    # The news of it was lost.
    holders.spoke("e")
    assert (holders.names, holders.decode) == (("e",), "e")


def test_until_the_next_speaks_both_may_have_it() -> None:
    holders = Holders("p", "")
    holders.hands_over("p", "d")
    assert (holders.names, holders.decode, holders.after("p")) == (("p", "d"), "d", "d")
    # Refused there, so it is offered elsewhere.
    holders.hands_over("p", "e")
    assert (holders.names, holders.decode) == (("p", "e"), "e")
    holders.spoke("p")
    assert holders.names == ("p", "e")
    holders.spoke("e")
    holders.hands_over("e", "d")
    holders.hands_over("e", "e")
    assert (holders.names, holders.decode, holders.after("e")) == (("e",), "e", "e")


def test_news_of_two_hand_overs_may_come_in_the_other_order() -> None:
    holders = Holders("p", "")
    holders.hands_over("d", "e")
    holders.hands_over("p", "d")
    assert (holders.names, holders.decode) == (("p", "d", "e"), "e")
    holders.spoke("e")
    assert holders.names == ("e",)


def test_it_may_come_back() -> None:
    holders = Holders("p", "d")
    holders.spoke("d")
    holders.hands_over("d", "e")
    holders.hands_over("e", "d")
    assert holders.names == ("e", "d")
    holders.spoke("d")
    assert holders.names == ("d",)


def test_an_instance_remembers_the_newest_that_it_gave_away() -> None:
    handed_on = HandedOn(most=2)
    for epoch, name in enumerate(("a", "b", "c"), 5):
        handed_on.note(name, epoch, f"to {name}")
    assert [handed_on.to(name, epoch) for epoch, name in enumerate(("a", "b", "c"), 5)] == ["", "to b", "to c"]
    assert handed_on.to("b", 7) == ""
    assert handed_on.take("b", 5) == ""
    handed_on.note("b", 8, "elsewhere")
    assert handed_on.take("b", 9) == "elsewhere"
    assert handed_on.take("b", 9) == ""


@pytest.mark.parametrize("most", [1, 3])
def test_of_one_sequence_the_last_time_counts(most: int) -> None:
    handed_on = HandedOn(most)
    handed_on.note("a", 1, "d")
    handed_on.note("a", 1, "e")
    assert handed_on.to("a", 1) == "e"
