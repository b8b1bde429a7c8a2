"""A request's way through a simulated cluster: routed, prefilled, handed over, decoded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.messages.cluster import LanguageRole
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.link import Network
from loadgen.simulator.language.requests import ChatRequest, Progress
from loadgen.simulator.language.router import Route, Router

FUSED = (LanguageRole.PREFILL, LanguageRole.DECODE)


@dataclass(slots=True)
class _Underway:
    route: Route
    decode: str


class Cluster:
    """Instances, the network between them, and the router before them. It is their ``Watcher``."""

    def __init__(self, clock: Clock, router: Router, network: Network) -> None:
        self.progress: dict[str, Progress] = {}
        self.instances: dict[str, Instance] = {}
        self._clock = clock
        self._router = router
        self._network = network
        self._underway: dict[str, _Underway] = {}

    def add(self, instance: Instance, roles: Iterable[LanguageRole]) -> None:
        self.instances[instance.name] = instance
        self._router.has_roles(instance.name, tuple(roles))

    def run(self, requests: Iterable[ChatRequest]) -> Mapping[str, Progress]:
        """From the first arrival to the last end."""
        for request in requests:
            self._clock.at(request.arrival_s, lambda request=request: self.arrive(request))  # type: ignore[misc]
        self._clock.run()
        return self.progress

    def arrive(self, request: ChatRequest) -> None:
        """A request comes now."""
        route = self._router.route(request)
        self.progress[request.name] = Progress(request, prefilled_by=route.prefill, cached_tokens=route.cached_tokens)
        self._underway[request.name] = _Underway(route, route.decode)
        hands_over = route.decode != route.prefill
        self.instances[route.prefill].prefill(request, hands_over, cached_tokens=route.cached_tokens)

    def began(self, request: ChatRequest, instance: Instance) -> None:
        pass

    def prefilled(self, request: ChatRequest, instance: Instance) -> None:
        self.progress[request.name].first_token_s = self._clock.now_s
        self._router.prefilled(request)
        underway = self._underway[request.name]
        if request.answer_tokens > 1 and underway.decode != instance.name:
            size = request.prompt_tokens * instance.machine.kv_token_bytes
            self._network.send(
                instance.name, underway.decode, size, 1, lambda: self._arrived(request, instance, underway.decode)
            )

    def _arrived(self, request: ChatRequest, source: Instance, target: str) -> None:
        source.release(request.name)
        self.instances[target].decode(request)

    def ended(self, request: ChatRequest, instance: Instance) -> None:
        progress = self.progress[request.name]
        progress.end_s = self._clock.now_s
        progress.decoded_by = instance.name
        del self._underway[request.name]
        self._router.ended(request)

    def preempted(self, request: ChatRequest, instance: Instance) -> None:
        self.progress[request.name].preempted += 1
