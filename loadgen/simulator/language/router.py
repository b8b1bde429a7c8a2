"""Where a request is computed. A router hears what the live scheduler hears, and nothing else."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.messages.cluster import LanguageRole
from common.policies.language.chat_dispatch import ChatDispatch
from common.policies.language.chat_events import (
    ChatArrived,
    ChatEnded,
    ChatPrefilled,
    Event,
    InstanceJoined,
    RouteSequence,
)
from common.policies.language.chat_rule import ChatRule
from common.policies.language.least_delay import LeastDelay
from common.policies.language.length_prediction import LengthRange
from common.policies.language.routing import Costs
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.requests import ChatRequest

_GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Route:
    """Prefill there, decode there. The cluster's dispatcher, where it has one, chooses ``decode`` anew.

    ``cached_tokens``: how much of the prompt need not be computed at the prefill instance.
    """

    prefill: str
    decode: str
    cached_tokens: int = 0


class Router(Protocol):
    """The global scheduler's part in a request's life."""

    def has_roles(self, instance: str, roles: Collection[LanguageRole]) -> None:
        """From now on the instance takes new requests for these; none: it takes none."""

    def route(self, request: ChatRequest, predicted: LengthRange | None, held: Mapping[str, int]) -> Route:
        """A request has come.

        Args:
            predicted: how long its answer will be; None: nobody predicts.
            held: how many of its prompt's tokens an instance has already; 0 where it is not named.
        """

    def prefilled(self, request: ChatRequest) -> None:
        """Its first token is there."""

    def ended(self, request: ChatRequest) -> None:
        """Its last token is there."""


class LeastLoad:
    """The least loaded instances, by the live scheduler's own class."""

    def __init__(self, clock: Clock, rule: ChatRule | None = None, kv_tokens: int = 1 << 20) -> None:
        self._clock = clock
        self._dispatch = ChatDispatch() if rule is None else ChatDispatch(rule=rule)
        self._kv_tokens = kv_tokens
        self._epochs: dict[str, int] = {}

    def has_roles(self, instance: str, roles: Collection[LanguageRole]) -> None:
        self._tell(InstanceJoined(instance, tuple(roles), self._kv_tokens))

    def route(self, request: ChatRequest, predicted: LengthRange | None, held: Mapping[str, int]) -> Route:
        # What the live scheduler knows of the answer is the most that was asked for; here that is the answer itself.
        return self._routed(request, request.answer_tokens, {}, held)

    def _routed(
        self, request: ChatRequest, answer_tokens: int, cached: Mapping[str, int], held: Mapping[str, int]
    ) -> Route:
        name, prompt_tokens = request.name, request.prompt_tokens
        arrived = ChatArrived(name, _GATEWAY, request.arrival_s, prompt_tokens, answer_tokens, cached=cached)
        (routed,) = self._tell(arrived)
        self._epochs[name] = routed.epoch
        return Route(routed.prefill, routed.decode, held.get(routed.prefill, 0))

    def prefilled(self, request: ChatRequest) -> None:
        self._tell(ChatPrefilled(request.name, self._epochs[request.name]))

    def ended(self, request: ChatRequest) -> None:
        self._tell(ChatEnded(request.name, self._epochs.pop(request.name)))

    def _tell(self, event: Event) -> list[RouteSequence]:
        return self._dispatch.handle(event, self._clock.now_s)


class FluidRoles(LeastLoad):
    """Ours: least delay over all instances, whose roles are what they are given. It goes by ``costs`` as they are."""

    def __init__(self, clock: Clock, rule: LeastDelay, costs: Costs, kv_tokens: int) -> None:
        super().__init__(clock, ChatRule(rule, costs, corrects=False), kv_tokens)

    def route(self, request: ChatRequest, predicted: LengthRange | None, held: Mapping[str, int]) -> Route:
        if predicted is None:
            raise ValueError("delays follow from predicted lengths: give the cluster a predictor")
        return self._routed(request, predicted.middle, held, held)
