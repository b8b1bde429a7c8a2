"""A request's way through a simulated cluster: routed, prefilled, handed over, decoded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.messages.cluster import LanguageRole
from common.policies.language.length_prediction import LengthRange
from loadgen.simulator.language.clock import Clock
from loadgen.simulator.language.control import ControlPlane
from loadgen.simulator.language.history import Histories
from loadgen.simulator.language.instance import Instance
from loadgen.simulator.language.link import Network
from loadgen.simulator.language.predictors import Predictor, PredictorTax
from loadgen.simulator.language.requests import ChatRequest, Progress
from loadgen.simulator.language.router import Route, Router

FUSED = (LanguageRole.PREFILL, LanguageRole.DECODE)


@dataclass(slots=True)
class _Underway:
    request: ChatRequest
    route: Route
    predicted: LengthRange | None
    predicted_s: float
    decode: str | None
    prefilled: bool = False


class Cluster:
    """Instances, the network between them, and the router before them. It is their ``Watcher``.

    Args:
        predictor: says how long answers will be; None: nobody does.
        taxes: the predictor's load on each prefill instance, by name; what is not named has none.
        histories: what instances keep of what they have computed; None: nothing.
        expects_middle: admission goes by the middle of a predicted range; TetriInfer's by the lower end (5.2.3).
    """

    def __init__(
        self,
        clock: Clock,
        router: Router,
        network: Network,
        predictor: Predictor | None = None,
        taxes: Mapping[str, PredictorTax] | None = None,
        expects_middle: bool = False,
        histories: Histories | None = None,
    ) -> None:
        self.progress: dict[str, Progress] = {}
        self.instances: dict[str, Instance] = {}
        self.control: ControlPlane | None = None
        self.histories = histories or Histories(0, 1)
        self._clock = clock
        self._router = router
        self._network = network
        self._predictor = predictor
        self._taxes = taxes or {}
        self._expects_middle = expects_middle
        self._underway: dict[str, _Underway] = {}
        self._ticking = False

    def add(self, instance: Instance, roles: tuple[LanguageRole, ...]) -> None:
        """With a control plane every instance has exactly one role."""
        self.instances[instance.name] = instance
        self.histories.add(instance.name)
        if self.control is not None:
            (role,) = roles
            self.control.add(instance, role)
        else:
            self._router.has_roles(instance.name, roles)

    def run(self, requests: Iterable[ChatRequest]) -> Mapping[str, Progress]:
        """From the first arrival to the last end."""
        for request in requests:
            self._clock.at(request.arrival_s, self._arrival_of(request))
        self._clock.run()
        return self.progress

    def arrive(self, request: ChatRequest) -> None:
        """A request comes now."""
        self._keep_ticking()
        predicted = self._predictor.predict(request) if self._predictor is not None else None
        route = self._router.route(request, predicted, self.histories.tokens_at(request))
        self.progress[request.name] = Progress(request, prefilled_by=route.prefill, cached_tokens=route.cached_tokens)
        if self.control is not None:
            self.control.came(request, route.cached_tokens)
        tax = self._taxes.get(route.prefill)
        predicted_s = tax.predict(request.prompt_tokens, self._clock.now_s) if tax is not None else self._clock.now_s
        decode = None if self.control is not None else route.decode
        underway = _Underway(request, route, predicted, predicted_s, decode)
        self._underway[request.name] = underway
        hands_over = decode != route.prefill
        expected = 0 if hands_over else self._expected(underway)
        self.instances[route.prefill].prefill(request, hands_over, expected, route.cached_tokens)

    # --- what instances tell ------------------------------------------------------------------------------------

    def began(self, request: ChatRequest, instance: Instance) -> None:
        underway = self._underway[request.name]
        if self.control is not None and underway.decode is None and request.answer_tokens > 1:
            # A predictor that is not done yet is waited for.
            if underway.predicted_s > self._clock.now_s:
                self._clock.at(underway.predicted_s, lambda: self._ask(underway))
            else:
                self._ask(underway)

    def prefilled(self, request: ChatRequest, instance: Instance) -> None:
        self.progress[request.name].first_token_s = self._clock.now_s
        self._router.prefilled(request)
        self.histories.prefilled(request, instance.name)
        underway = self._underway[request.name]
        underway.prefilled = True
        self._send(underway)

    def ended(self, request: ChatRequest, instance: Instance) -> None:
        progress = self.progress[request.name]
        progress.end_s = self._clock.now_s
        progress.decoded_by = instance.name
        del self._underway[request.name]
        self._router.ended(request)
        self.histories.ended(request, instance.name)
        if self._predictor is not None:
            self._predictor.observe(request)
        if self.control is not None:
            self.control.ended(request, instance.name)

    def preempted(self, request: ChatRequest, instance: Instance) -> None:
        self.progress[request.name].preempted += 1

    # --- handing over -------------------------------------------------------------------------------------------

    def chosen(self, name: str, decode: str) -> None:
        """The dispatcher has chosen who goes on with a sequence."""
        underway = self._underway[name]
        underway.decode = decode
        if underway.prefilled:
            self._send(underway)

    def _ask(self, underway: _Underway) -> None:
        if self.control is None or underway.predicted is None:
            raise RuntimeError("a dispatcher needs a prediction")
        self.control.began(underway.request, underway.route.prefill, underway.predicted)

    def _send(self, underway: _Underway) -> None:
        request, source, target = underway.request, underway.route.prefill, underway.decode
        if request.answer_tokens == 1 or target is None:
            return  # it ends with its first token, or its decode instance is yet to be chosen
        if target != source:
            missing = request.prompt_tokens - self.histories.tokens_at(request).get(target, 0)
            size = missing * self.instances[source].machine.kv_token_bytes
            self._network.send(source, target, size, 1, lambda: self._arrived(underway, target))
        elif self.control is not None:
            self.instances[source].keep(request, self._expected(underway))
            self.control.handed_over(request, source, target)

    def _arrived(self, underway: _Underway, target: str) -> None:
        request, source = underway.request, underway.route.prefill
        self.instances[source].release(request.name)
        self.instances[target].decode(request, self._expected(underway))
        if self.control is not None:
            self.control.handed_over(request, source, target)

    def _expected(self, underway: _Underway) -> int:
        """How many tokens prompt and answer are predicted to have; 0 where nobody predicts."""
        predicted = underway.predicted
        if predicted is None:
            return 0
        answer = predicted.middle if self._expects_middle else predicted.low
        return underway.request.prompt_tokens + answer

    # --- time ---------------------------------------------------------------------------------------------------

    def _arrival_of(self, request: ChatRequest) -> Callable[[], None]:
        return lambda: self.arrive(request)

    def _keep_ticking(self) -> None:
        """The monitor's clock runs as long as there is anything to do."""
        if self.control is not None and not self._ticking:
            self._ticking = True
            self._tick(self.control)

    def _tick(self, control: ControlPlane) -> None:
        control.tick()
        self._clock.after(control.period_s, lambda: self._next_tick(control))

    def _next_tick(self, control: ControlPlane) -> None:
        if self._underway:
            self._tick(control)
        else:
            self._ticking = False
