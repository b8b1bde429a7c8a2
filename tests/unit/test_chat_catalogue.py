"""When a language model is on offer: as soon as ready members prefill and decode it."""

from common.messages.cluster import LanguageModelInfo, LanguageRole, Member, MemberState, Service
from gateway.catalogue import Catalogue, complete_language_models, missing

PREFILL, DECODE = (LanguageRole.PREFILL,), (LanguageRole.DECODE,)


def member(
    instance: str, roles: tuple[LanguageRole, ...], model: str = "tiny", state: MemberState = MemberState.READY
) -> Member:
    return Member(
        instance=instance,
        incarnation="1",
        service=Service.PREFILL,
        state=state,
        host="here",
        pid=1,
        started_at_s=0.0,
        language_model=LanguageModelInfo(name=model, context_tokens=512),
        roles=roles,
    )


def test_a_model_needs_both_roles_from_ready_members() -> None:
    assert set(complete_language_models([member("a", PREFILL + DECODE)])) == {"tiny"}
    assert set(complete_language_models([member("a", PREFILL), member("b", DECODE)])) == {"tiny"}
    for members in (
        [],
        [member("a", PREFILL)],
        [member("a", PREFILL), member("b", DECODE, model="other")],
        [member("a", PREFILL), member("b", DECODE, state=MemberState.STARTING)],
    ):
        assert complete_language_models(members) == {}


def test_readiness_asks_for_it_only_where_language_is_served() -> None:
    wanted = "a language model that is prefilled and decoded"
    assert wanted not in missing([], True)
    assert wanted in missing([], True, language=True)
    assert wanted not in missing([member("a", PREFILL + DECODE)], True, language=True)


def test_a_model_stays_on_offer_while_its_instances_restart() -> None:
    catalogue = Catalogue()
    catalogue.update({"a": member("a", PREFILL + DECODE)})
    catalogue.update({})
    assert set(catalogue.language_models) == {"tiny"}
