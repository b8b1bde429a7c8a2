"""When a language model is on offer: as soon as ready members prefill and decode it."""

from common.messages.cluster import LanguageRole, MemberState
from gateway.catalogue import Catalogue, complete_language_models, missing
from tests.support.language import language_member

PREFILL, DECODE = (LanguageRole.PREFILL,), (LanguageRole.DECODE,)


def test_a_model_needs_both_roles_from_ready_members() -> None:
    assert set(complete_language_models([language_member("a", PREFILL + DECODE)])) == {"tiny"}
    assert set(complete_language_models([language_member("a", PREFILL), language_member("b", DECODE)])) == {"tiny"}
    for members in (
        [],
        [language_member("a", PREFILL)],
        [language_member("a", PREFILL), language_member("b", DECODE, model="other")],
        [language_member("a", PREFILL), language_member("b", DECODE, state=MemberState.STARTING)],
    ):
        assert complete_language_models(members) == {}


def test_readiness_asks_for_it_only_where_language_is_served() -> None:
    wanted = "a language model that is prefilled and decoded"
    assert wanted not in missing([], True)
    assert wanted in missing([], True, language=True)
    assert wanted not in missing([language_member("a", PREFILL + DECODE)], True, language=True)


def test_a_model_stays_on_offer_while_its_instances_restart() -> None:
    catalogue = Catalogue()
    catalogue.update({"a": language_member("a", PREFILL + DECODE)})
    catalogue.update({})
    assert set(catalogue.language_models) == {"tiny"}
