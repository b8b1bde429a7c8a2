"""Which models the stack can serve, and whether it can serve at all, read off its members."""

from collections.abc import Iterable, Mapping

from common.messages.cluster import LanguageModelInfo, LanguageRole, Member, MemberState, Service, VideoModelInfo

VIDEO_SERVICES = (Service.ENCODER, Service.DIT, Service.VAE)


def complete_models(members: Iterable[Member]) -> dict[str, VideoModelInfo]:
    """The models that have a ready member in each of the three video services, by name.

    What a model can do is said by its DiT, the first by instance name.
    """
    ready = sorted(
        (member for member in members if member.state is MemberState.READY and member.video_model is not None),
        key=lambda member: member.instance,
    )
    offered: dict[Service, dict[str, VideoModelInfo]] = {service: {} for service in VIDEO_SERVICES}
    for member in ready:
        if member.video_model is not None and member.service in offered:
            offered[member.service].setdefault(member.video_model.name, member.video_model)
    common = set.intersection(*(set(models) for models in offered.values()))
    return {name: info for name, info in sorted(offered[Service.DIT].items()) if name in common}


def complete_language_models(members: Iterable[Member]) -> dict[str, LanguageModelInfo]:
    """The models that ready members prefill and decode, by name. What a model can do is said by the first of them."""
    infos: dict[str, LanguageModelInfo] = {}
    roles: dict[str, set[LanguageRole]] = {}
    for member in sorted(members, key=lambda member: member.instance):
        if member.state is MemberState.READY and member.language_model is not None:
            infos.setdefault(member.language_model.name, member.language_model)
            roles.setdefault(member.language_model.name, set()).update(member.roles)
    return {name: info for name, info in sorted(infos.items()) if roles[name] >= set(LanguageRole)}


def missing(members: Iterable[Member], broker_connected: bool, language: bool = False) -> list[str]:
    """What the stack still waits for before it can make a video and, with ``language``, chat; empty when it can."""
    known = list(members)
    ready = {member.service for member in known if member.state is MemberState.READY}
    lacking = [] if broker_connected else ["broker"]
    lacking += [str(service) for service in (Service.SCHEDULER, *VIDEO_SERVICES) if service not in ready]
    if not lacking and not complete_models(known):
        lacking.append("a video model that encoder, dit and vae have in common")
    if language and not complete_language_models(known):
        lacking.append("a language model that is prefilled and decoded")
    return lacking


class Catalogue:
    """The models on offer. When the last worker of a service is lost, the models stay on offer: jobs wait in the queue
    until it is back, so a restart refuses nobody."""

    def __init__(self) -> None:
        self._models: dict[str, VideoModelInfo] = {}
        self._language_models: dict[str, LanguageModelInfo] = {}

    def update(self, members: Mapping[str, Member]) -> None:
        complete = complete_models(members.values())
        if complete:
            self._models = complete
        language = complete_language_models(members.values())
        if language:
            self._language_models = language

    @property
    def video_models(self) -> Mapping[str, VideoModelInfo]:
        return self._models

    @property
    def language_models(self) -> Mapping[str, LanguageModelInfo]:
        return self._language_models
